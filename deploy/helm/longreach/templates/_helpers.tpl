{{- define "longreach.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that say which pods are meant; they never change. Takes (list . COMPONENT). */}}
{{- define "longreach.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: longreach
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "longreach.labels" -}}
{{- $ := index . 0 -}}
{{ include "longreach.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version }}
{{- end -}}

{{- define "longreach.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "longreach.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "longreach.secret" -}}
{{- .Values.apiKey.existingSecret | default (ternary (printf "%s-api-key" (include "longreach.name" .)) "" (ne .Values.apiKey.value "")) -}}
{{- end -}}

{{- define "longreach.claim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "longreach.name" .)) -}}
{{- end -}}

{{/* The most replicas there can be. */}}
{{- define "longreach.mostReplicas" -}}
{{- ternary .Values.autoscaling.maxReplicas .Values.replicas .Values.autoscaling.enabled | int -}}
{{- end -}}

{{/* The server's config file: what the user gave, and what follows from other values. */}}
{{- define "longreach.config" -}}
{{- range list "host" "port" "shutdown-timeout" "api-key" "api-key-file" -}}
{{- if hasKey $.Values.config . -}}
{{- fail (printf "config.%s: the chart sets it itself; see service.port, shutdown.drainSeconds, apiKey and apiKeyFile" .) -}}
{{- end -}}
{{- end -}}
{{- $config := deepCopy .Values.config -}}
{{- if and (gt (int .Values.gpus) 1) (not (hasKey $config "tensor-parallel-size")) -}}
{{- $_ := set $config "tensor-parallel-size" (int .Values.gpus) -}}
{{- end -}}
{{- if .Values.apiKeyFile.existingSecret -}}
{{- if include "longreach.secret" . -}}
{{- fail "apiKeyFile and apiKey: requests would need both keys in one header; set one" -}}
{{- end -}}
{{- $_ := set $config "api-key-file" (printf "/etc/longreach-keys/%s" .Values.apiKeyFile.key) -}}
{{- if not (hasKey $config "open-paths") -}}
{{- $_ := set $config "open-paths" (list "/health" "/ready" "/ping" "/metrics") -}}
{{- end -}}
{{- end -}}
{{- $_ := set $config "host" "0.0.0.0" -}}
{{- $_ := set $config "port" 8000 -}}
{{- $_ := set $config "shutdown-timeout" (int .Values.shutdown.drainSeconds) -}}
{{- toYaml $config -}}
{{- end -}}
