// What a guest did last when its processor shut down: the outer kernel's own record of it, kept in a small ring.
import { labPaths } from "./RootImage.ts"

/** `SVM_EXIT_SHUTDOWN`: a fault that could not be delivered (AMD's manual, volume 2, appendix C). */
const SVM_EXIT_SHUTDOWN = "0x7f"

const EVENTS = "kvm_entry kvm_exit kvm_inj_exception kvm_page_fault"

/** KiB for each processor: some hundred events. */
const RING_KIB = 64

const LINES = 60

/**
 * A job's script that runs `command`, and prints the last exits of a guest whose processor shut down: afterwards KVM has reset
 * the processor, and its registers say nothing any more. Ends with the command's exit code.
 */
export const watched = (command: string): string =>
  `cd /sys/kernel/tracing
echo 0 > tracing_on; echo > trace; echo ${RING_KIB} > buffer_size_kb
for event in ${EVENTS}; do echo 0 > events/kvm/$event/filter; echo 1 > events/kvm/$event/enable; done
[ -e /run/watched ] || echo 'traceoff if exit_reason == ${SVM_EXIT_SHUTDOWN}' > events/kvm/kvm_exit/trigger
: > /run/watched
echo 1 > tracing_on
cd ${labPaths.repository}
${command}
code=$?
cd /sys/kernel/tracing
[ "$(cat tracing_on)" = 1 ] || { echo "A guest's processor has shut down. Before that:"; tail -n ${LINES} trace; }
echo 0 > tracing_on
for event in ${EVENTS}; do echo 0 > events/kvm/$event/enable; done
exit $code
`
