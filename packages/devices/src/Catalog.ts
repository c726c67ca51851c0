/** All devices of this package in one layer. */
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import * as Layer from "effect/Layer"
import { layerBalloon } from "./Balloon.ts"
import { layerBlock } from "./Block.ts"
import { layerConsole } from "./Console.ts"
import { layerEntropy } from "./Entropy.ts"
import type { EntropySource } from "./EntropySource.ts"
import { layerMem } from "./Mem.ts"
import { layerNet } from "./Net.ts"
import { layerPci } from "./pci/PciHostBridge.ts"
import { layerPower } from "./Power.ts"
import { layerSerial } from "./Serial.ts"

/** A catalog of all devices of this package. Entropy needs a source of random bytes. */
export const layer: Layer.Layer<DeviceCatalog, never, EntropySource> = layerEntropy.pipe(
  Layer.provide(layerNet),
  Layer.provide(layerConsole),
  Layer.provide(layerBalloon),
  Layer.provide(layerBlock),
  Layer.provide(layerMem),
  Layer.provide(layerPci),
  Layer.provide(layerPower),
  Layer.provide(layerSerial),
  Layer.provide(DeviceCatalog.layerEmpty)
)
