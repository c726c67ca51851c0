/** The last lines of a terminal's output as text that is safe to print in a report. */

const LINE_LENGTH_MAX = 400
const REPLACEMENT = "\ufffd"

/** Escape sequences of terminals: CSI with its parameters, OSC up to its end, and two-byte escapes. */
// oxlint-disable-next-line no-control-regex -- control characters are what this matches
const ESCAPE_SEQUENCE = /\u001b(?:\[[0-?]*[ -/]*[@-~]|\][^\u0007\u001b]*(?:\u0007|\u001b\\)?|[ -~])/g
// oxlint-disable-next-line no-control-regex -- control characters are what this matches
const CONTROL_CHARACTER = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g

/** The UTF-8 text of `bytes`; what is not UTF-8 becomes U+FFFD. */
const decodeUtf8 = (bytes: Uint8Array): string => {
  let text = ""
  for (let i = 0; i < bytes.length;) {
    const lead = bytes[i] ?? 0
    const length = lead < 0x80
      ? 1
      : lead >= 0xc2 && lead < 0xe0
      ? 2
      : lead >= 0xe0 && lead < 0xf0
      ? 3
      : lead >= 0xf0 && lead < 0xf5
      ? 4
      : 0
    let code = length <= 1 ? lead : lead & (0x7f >> length)
    let valid = length > 0
    for (let j = 1; j < length && valid; j++) {
      const next = bytes[i + j] ?? 0
      valid = (next & 0xc0) === 0x80
      code = code * 64 + (next & 0x3f)
    }
    const wellFormed = valid && code <= 0x10_ffff && (code < 0xd800 || code > 0xdfff) &&
      (length < 3 || code >= (length === 3 ? 0x800 : 0x1_0000))
    text += wellFormed ? String.fromCodePoint(code) : REPLACEMENT
    i += wellFormed ? length : 1
  }
  return text
}

/** The last `count` lines of `bytes`, oldest first, without line ends, colours and control characters. */
export const lastLines = (bytes: Uint8Array, count: number): ReadonlyArray<string> => {
  const lines = decodeUtf8(bytes).replaceAll(ESCAPE_SEQUENCE, "").split("\n")
  if (lines.at(-1) === "") lines.pop()
  return lines.slice(-count).map((line) => line.replaceAll(CONTROL_CHARACTER, "").slice(0, LINE_LENGTH_MAX))
}
