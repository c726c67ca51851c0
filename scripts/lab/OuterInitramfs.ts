// The first userspace of the lab's outer machine: finds the root image, unpacks the sources, hands over to the agent.
import { readFile } from "node:fs/promises"
import { gzipSync } from "node:zlib"
import { PLAIN_SOURCES } from "./Checkout.ts"
import { encodeCpio } from "./Cpio.ts"
import { initramfsEntries } from "./GuestInitramfs.ts"
import { LabError } from "./LabError.ts"
import type { LinuxKernel } from "./LinuxKernel.ts"

/** What the outer kernel needs: KVM for the emulated AMD processor, the disks, the channel to the host. */
const OUTER_MODULES: ReadonlyArray<string> = ["kvm_amd", "virtio_pci", "virtio_blk", "virtio_console", "ext4", "tun"]

const init = (modules: ReadonlyArray<string>): string =>
  `#!/bin/busybox sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in ${modules.join(" ")}; do insmod /lib/modules/$module.ko; done
mkdir /r
mount -t ext4 -o ro /dev/vda /r || { echo "LAB no root image"; poweroff -f; }
mount -t tmpfs tmpfs /r/tmp
mount -t tmpfs tmpfs /r/run
mount -t tmpfs tmpfs /r/repo
for folder in dev proc sys; do mount --bind /$folder /r/$folder; done
mount -t debugfs debugfs /r/sys/kernel/debug
mount -t tracefs tracefs /r/sys/kernel/tracing
(cd /r/repo && cpio -i -d -m < /dev/vdb 2>/dev/null)
ln -s /deps/node_modules /r/repo/node_modules
cp /agent /plain.mjs /r/run/
read -r up rest < /proc/uptime
echo "LAB ready $up"
# Should everything else fail to end this machine, it ends itself.
for word in $(cat /proc/cmdline); do case "$word" in troupe.limit=*) limit="\${word#*=}" ;; esac; done
(sleep "$limit"; echo "LAB limit reached"; poweroff -f) &
chroot /r /bin/sh /run/agent
poweroff -f
`

// One channel carries requests and output. A request is a line; the output is followed by a line that starts with the
// request's own random name, which nothing that runs in the lab can know, and then by an archive of files.
const AGENT = `
export PATH=/bin:/usr/bin HOME=/root TMPDIR=/tmp NODE_NO_WARNINGS=1 NODE_OPTIONS=--import=/run/plain.mjs
# Compiling is slow on an emulated processor: what one job has compiled, the next ones need not.
export NODE_COMPILE_CACHE=/tmp/compiled
ip link set lo up
exec 3<>/dev/vport0p1
cat /dev/vport0p2 >/dev/null 3>&- &
echo ready >&3
while read -r name limit script <&3; do
  job=/tmp/$name
  mkdir -p $job/files
  echo "$script" | base64 -d > $job/script
  cd /repo
  FILES=$job/files setsid sh $job/script >&3 2>&1 3>&- </dev/null &
  pid=$!
  (sleep $limit; touch $job/late; kill -KILL -- -$pid) >/dev/null 2>&1 3>&- &
  watch=$!
  read -r begun rest < /proc/uptime
  wait $pid
  code=$?
  read -r ended rest < /proc/uptime
  kill -KILL $watch 2>/dev/null
  kill -KILL -- -$pid 2>/dev/null
  [ -e $job/late ] && code=late
  (cd $job/files && find . -type f | cpio -o -H newc > $job/archive 2>/dev/null)
  printf '\\n%s %s %s %s %s\\n' $name $code $begun $ended $(wc -c < $job/archive) >&3
  cat $job/archive >&3
  rm -rf $job
done
`

/** The outer machine's initramfs, compressed. */
export const buildOuterInitramfs = async (kernel: LinuxKernel): Promise<Buffer> => {
  if (kernel.modules === undefined) throw new LabError(`there are no modules for the kernel ${kernel.release}`)
  const modules = await kernel.modules.load(OUTER_MODULES)
  const entries = initramfsEntries(await readFile(kernel.busybox), init(modules.map(({ name }) => name)), modules)
  // Little compression: it is read once, by an emulated processor.
  const more = [["agent", AGENT], ["plain.mjs", PLAIN_SOURCES]] as const
  return gzipSync(
    encodeCpio([...entries, ...more.map(([path, text]) => ({ type: "file" as const, path, data: Buffer.from(text) }))]),
    { level: 1 }
  )
}
