// What the demo's guest is doing, in plain words, told from the lines that it prints.

const PREFIX = "troupe-guest: "

type Teller = (...groups: ReadonlyArray<string>) => string

const TELLERS: ReadonlyArray<readonly [RegExp, Teller]> = [
  [/^entry pvh$/, () => "It boots: the processor has entered the kernel by its PVH entry, in 32-bit mode."],
  [/^entry linux64$/, () => "It boots: the processor has entered the kernel by its 64-bit entry."],
  [/^memory (\d+) MiB/, (size) => `It has found its memory map: ${size} MiB.`],
  [/^acpi rsdp/, () => "It reads the ACPI tables, which describe the machine."],
  [/^cpus (\d+)$/, (count) => `The tables list ${count} processors.`],
  [/^ready$/, () => "It has finished booting and does what its command line says."],
  [/^smp (\d+) of (\d+) up$/, (up, all) => `SMP: it has started ${up} of ${all} processors, and they share memory.`],
  [/^timer (\d+) ticks$/, (ticks) => `Timer: it slept and was woken by ${ticks} timer interrupts.`],
  [/^timer (\d+) sleeps$/, (count) => `Timer: it slept ${count} times, 10 ms each.`],
  [
    /^rng request 0 (\d+) bytes/,
    (bytes) =>
      `Entropy: its driver read ${bytes} random bytes through a virtio queue; the device answered by interrupt.`
  ],
  [/^poweroff$/, () => "Power-off: it asks the machine to turn itself off, through ACPI."]
]

/** What a line of the guest means; undefined when it needs no words. */
export const explain = (line: string): string | undefined => {
  if (!line.startsWith(PREFIX)) return undefined
  const text = line.slice(PREFIX.length)
  for (const [pattern, tell] of TELLERS) {
    const match = pattern.exec(text)
    if (match !== null) return tell(...match.slice(1))
  }
  return undefined
}
