// The nested lab itself, without our VMM: jobs, their files and time limits, and that its KVM boots Linux under QEMU.
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { Lab } from "../../scripts/lab/Lab.ts"
import { missingForLab } from "../../scripts/lab/Requirements.ts"
import { labPaths } from "../../scripts/lab/RootImage.ts"

const whyNot = await missingForLab()
const title = "the nested lab"
if (whyNot !== undefined) console.warn(`SKIPPED: ${title}: ${whyNot}`)

describe.skipIf(whyNot !== undefined)(whyNot === undefined ? title : `${title} (skipped: ${whyNot})`, () => {
  let lab: Lab

  beforeAll(async () => {
    lab = await Lab.start({ name: "test-lab" })
  })

  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]()
  })

  it("returns a job's exit code, output and files", async () => {
    const result = await lab.run({
      script: "echo out; echo err >&2; mkdir $FILES/a; printf 'one\\0two' > $FILES/a/b; : > $FILES/empty; exit 7"
    })
    assert.strictEqual(result.code, 7)
    assert.strictEqual(result.output, "out\nerr\n")
    assert.deepStrictEqual([...result.files.keys()].toSorted(), ["a/b", "empty"])
    assert.strictEqual(result.files.get("a/b")?.toString(), "one\0two")
  })

  it("passes on output as it comes, and binary output unchanged", async () => {
    const chunks: Array<Buffer> = []
    const result = await lab.run({
      script:
        "dd if=/lab/bzImage bs=64k count=4 2>/dev/null | md5sum > $FILES/sum; dd if=/lab/bzImage bs=64k count=4 2>/dev/null | base64",
      onOutput: (chunk) => chunks.push(chunk)
    })
    assert.strictEqual(Buffer.concat(chunks).toString(), result.output)
    const sent = Buffer.from(result.output.replaceAll("\n", ""), "base64")
    assert.strictEqual(sent.length, 4 * 64 * 1024)
    assert.strictEqual(sent.readUInt32LE(0x202), 0x53726448)
  })

  it("kills a job whose time is up with everything it started, and takes the next", async () => {
    const late = await lab.run({ script: "sleep 1000 & echo started; sleep 1000", timeoutSeconds: 5 })
    assert.isUndefined(late.code)
    assert.strictEqual(late.output, "started\n")
    // What is killed is gone when the kernel has come round to it.
    const gone = "for i in $(seq 100); do ps -o args | grep -q '^sleep 1000$' || exit 0; sleep 0.1; done; exit 1"
    assert.strictEqual((await lab.run({ script: gone })).code, 0)
  })

  it("runs jobs that are given at once one after the other", async () => {
    const results = await Promise.all(["a", "b", "c"].map((word) => lab.run({ script: `echo ${word}` })))
    assert.deepStrictEqual(results.map(({ output }) => output), ["a\n", "b\n", "c\n"])
  })

  it("interrupts the outer machine again and again, whatever its processor waits for", async () => {
    const interrupts = "awk '/virtio[0-9]+-virtqueues/ { sum += $2 } END { print sum }' /proc/interrupts"
    const script = `begun=$(${interrupts}); [ -n "$begun" ] || exit 1
      for i in $(seq 600); do [ $(($(${interrupts}) - begun)) -ge 10 ] && exit 0; sleep 0.1; done; ${interrupts}; exit 2`
    const result = await lab.run({ script })
    assert.strictEqual(result.code, 0, result.output)
  })

  it("has the clone's sources, Node and an ordinary KVM", async () => {
    const result = await lab.run({
      script:
        `[ -c /dev/kvm ] && grep -q svm /proc/cpuinfo && node -p 'process.version' && ls ${labPaths.repository}/packages`
    })
    assert.strictEqual(result.output, `${process.version}\ncore\ndevices\nnode\nvsock\n`)
  })

  it("boots the kernel under QEMU: the KVM in the lab is good for an unmodified Linux", async () => {
    const result = await lab.run({
      script:
        `qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m 512 -nodefaults -no-user-config -display none \
        -no-reboot -serial stdio -kernel ${labPaths.vmlinux} -initrd ${labPaths.initrd} \
        -append "console=ttyS0 panic=-1 quiet troupe.action=poweroff"`
    })
    assert.match(result.output, /^TROUPE uname Linux /m)
    assert.strictEqual(result.code, 0, result.output)
  })
})
