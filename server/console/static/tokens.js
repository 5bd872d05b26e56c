// The text of tokens, from the strings that a tokenizer has for them.

/** The bytes that byte-level tokenizers (GPT-2's and its heirs) write as these characters. */
const BYTES = new Map();
{
  const plain = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let moved = 256;
  for (let byte = 0; byte < 256; byte++) BYTES.set(String.fromCodePoint(plain(byte) ? byte : moved++), byte);
}
const utf8 = new TextEncoder();

function byteLevel(token) {
  const bytes = Array.from(token, (character) => BYTES.get(character));
  return bytes.includes(undefined) ? utf8.encode(token) : bytes; // a special token is written as it is
}

function pieceLevel(token) {
  const byte = /^<0x([0-9A-F]{2})>$/.exec(token);
  return byte ? [parseInt(byte[1], 16)] : utf8.encode(token.replaceAll("▁", " "));
}

/**
 * The text of every so many tokens; a character that several tokens share goes with the last of them.
 * @param {string[]} tokens as vLLM's /tokenize names them.
 */
export function textOfBins(tokens, width) {
  const bytesOf = tokens.some((token) => /[ĠĊ]/.test(token)) ? byteLevel : pieceLevel;
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const texts = [];
  for (let first = 0; first < tokens.length; first += width) {
    const bytes = tokens.slice(first, first + width).flatMap((token) => [...bytesOf(token)]);
    texts.push(decoder.decode(Uint8Array.from(bytes), { stream: first + width < tokens.length }));
  }
  return texts;
}
