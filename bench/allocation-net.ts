// Run in a new process: how much is allocated for each frame that the network device takes from a TAP interface or gives to it.
import { makeNetWorkload } from "./NetWorkload.ts"
import { allocatesNothing } from "./SteadyAllocation.ts"

process.exitCode = 0
for (const direction of ["receive", "send"] as const) {
  const { fill, frames, serve } = makeNetWorkload(direction)
  const round = (): void => {
    fill()
    serve()
  }
  if (!allocatesNothing(`frames, ${direction}`, { things: frames, round })) process.exitCode = 1
}
