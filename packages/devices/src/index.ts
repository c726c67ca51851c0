/** The virtual devices of a machine. Single modules can be imported by their names. */
export { layerBlock, openDisk } from "./Block.ts"
export { layer } from "./Catalog.ts"
export { entropy, entropyPolicy, layerEntropy } from "./Entropy.ts"
export { EntropySource } from "./EntropySource.ts"
export { layerMem, makeMem, memPolicy } from "./Mem.ts"
export { layerPower, power } from "./Power.ts"
export { layerSerial, makeSerial } from "./Serial.ts"
