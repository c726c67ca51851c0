// Run in a new process: how much is allocated for each chain that goes through a queue, and through a device's loop behind the
// state machine of its transport.
import { CHAIN_SHAPES, makeChainsWorkload } from "./ChainsWorkload.ts"
import { allocatesNothing } from "./SteadyAllocation.ts"

const ways = [
  ["split", { packed: false, device: false }],
  ["packed", { packed: true, device: false }],
  ["split, through a device's loop", { packed: false, device: true }],
  ["packed, through a device's loop", { packed: true, device: true }]
] as const

process.exitCode = 0
for (const [name, options] of ways) {
  for (const shape of CHAIN_SHAPES) {
    const { chains, fill, serve } = makeChainsWorkload(shape, options)
    const round = (): void => {
      fill()
      serve()
    }
    if (!allocatesNothing(`chains, ${name}, ${shape}`, { things: chains, round })) process.exitCode = 1
  }
}
