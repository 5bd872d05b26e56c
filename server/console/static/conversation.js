// A conversation about one document, twice: with what was chosen, and dense.

import { Answer } from "./answer.js";
import { announce, by, copy, element } from "./elements.js";
import { figures, seconds } from "./figures.js";

const DENSE = {
  kv_cache: { policy: "none" },
  prefill_attention: { pattern: "dense" },
  decode_attention: { selector: "dense" },
};

const random = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export class Conversation {
  constructor(text) {
    this.document = text;
    this.turns = [];
    // Each side has a part of the prefix cache of its own: otherwise the second to ask would find the first one's prompt.
    this.salts = { chosen: random(), dense: random() };
    by("turns").replaceChildren();
    by("empty").hidden = false;
  }

  messages(side, question) {
    const said = this.turns.flatMap(({ asked, answers }) => [
      { role: "user", content: asked },
      { role: "assistant", content: (answers[side] ?? answers.chosen).text },
    ]);
    return [...said, { role: "user", content: this.asking(question) }];
  }

  /** The question, and in front of a conversation's first one the document. */
  asking(question) {
    return this.turns.length || !this.document ? question : `${this.document.trim()}\n\n${question}`;
  }

  /**
   * Ask both sides and show their answers.
   * @param {{question: string, words: object, name: string, options: object, dense: string}} wish
   *   words: our fields of the request; options: what goes to both sides; dense: after, together or no.
   * @param {(answer: Answer, messages: object[]) => void} told called when the chosen side has answered.
   * @throws {ApiError|DOMException} of the side that failed first; without any answer the turn goes.
   */
  async ask({ question, words, name, options, dense }, signal, told) {
    const node = copy("turn-template");
    node.querySelector(".question").textContent = question;
    by("empty").hidden = true;
    by("turns").append(node);
    const answers = { chosen: new Answer(name), ...(dense !== "no" && { dense: new Answer("dense") }) };
    node.querySelector(".answers").append(...Object.values(answers).map((answer) => answer.node));
    const fields = { chosen: words, dense: DENSE };
    const run = async (side) => {
      const messages = this.messages(side, question);
      await answers[side].run({ ...options, ...fields[side], messages, cache_salt: this.salts[side] }, signal);
      announce(`${answers[side].name} answers after ${seconds(answers[side].first ?? 0)}: ${answers[side].text}`);
      node.querySelector(".scroll").replaceChildren(figures(Object.values(answers)));
      if (side === "chosen") told(answers.chosen, messages);
    };
    announce("The prompt is sent.");
    node.scrollIntoView({ block: "nearest" });
    try {
      const first = run("chosen");
      if (dense === "after") await first;
      await Promise.all([first, ...(dense !== "no" ? [run("dense")] : [])]);
    } catch (error) {
      answers.dense?.giveUp();
      throw error;
    } finally {
      if (answers.chosen.text) this.turns.push({ asked: this.asking(question), answers });
      else node.remove();
      by("empty").hidden = this.turns.length > 0;
    }
  }
}
