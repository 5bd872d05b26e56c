// One answer of the server: asks, shows the text as it comes, and measures.

import { events } from "./api.js";
import { copy } from "./elements.js";
import { seconds } from "./figures.js";

export class Answer {
  /** @param {string} name of the side, as its heading says. */
  constructor(name) {
    this.name = name;
    this.node = copy("answer-template");
    this.node.querySelector("h4").textContent = name;
    this.out = this.node.querySelector(".text");
    this.text = "";
    this.say("in line");
  }

  say(state) {
    this.node.querySelector(".state").textContent = state;
  }

  /**
   * @param {object} body of the request; streaming and usage are added.
   * @throws {ApiError} the server or the network; what has come until then stays.
   */
  async run(body, signal) {
    const began = performance.now();
    this.begun = true;
    const clock = setInterval(() => this.say(`waiting, ${((performance.now() - began) / 1000).toFixed(1)} s`), 100);
    this.node.setAttribute("aria-busy", "true");
    try {
      const asked = { ...body, stream: true, stream_options: { include_usage: true } };
      for await (const event of events("v1/chat/completions", asked, signal)) {
        const delta = event.choices?.[0]?.delta ?? {};
        const thought = delta.reasoning ?? delta.reasoning_content;
        if (delta.content || thought) this.add(delta.content ?? "", thought ?? "", performance.now() - began, clock);
        this.ended = event.choices?.[0]?.finish_reason ?? this.ended;
        this.usage = event.usage ?? this.usage;
      }
      this.finish(performance.now() - began);
    } catch (error) {
      if (error.name === "AbortError") this.say("stopped");
      else this.fail(error);
      throw error;
    } finally {
      clearInterval(clock);
      this.node.removeAttribute("aria-busy");
    }
  }

  add(content, thought, now, clock) {
    if (this.first === undefined) {
      this.first = now;
      clearInterval(clock);
      this.say("answering");
    }
    this.text += content;
    this.out.append(content || thought);
  }

  finish(total) {
    const tokens = this.usage?.completion_tokens ?? 0;
    if (tokens > 1 && this.first !== undefined) this.perToken = (total - this.first) / (tokens - 1);
    const cut = this.ended === "length" ? ", cut at the limit" : "";
    this.say(`${tokens} tokens in ${seconds(total)}${cut}`);
    this.node.dataset.done = "";
  }

  /** The other side has failed: one that hasn't begun won't. */
  giveUp() {
    if (!this.begun) this.say("not asked");
  }

  fail(error) {
    this.say("failed");
    this.node.querySelector(".error").textContent = error.message;
  }
}
