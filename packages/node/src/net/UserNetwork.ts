/**
 * Guests on user-mode networks: no interface of the host, no privilege, no configuration. What the guest connects to, this process
 * connects to, after a policy has been asked.
 *
 * ```ts
 * KvmGuestLifecycle.layer.pipe(Layer.provide(UserNetwork.layer({ policy: allowPublic })))
 * ```
 */
import type { NetBackend } from "@troupe/core/NetBackend"
import { layerUserNet, type UserNetBackendOptions } from "@troupe/devices/net/user/UserNetBackend"
import * as Layer from "effect/Layer"
import { layerEntropySource } from "../KvmGuestLifecycle.ts"
import { layerWith as layerSocketsWith, type NodeSocketsOptions } from "./NodeSockets.ts"

/** What a host may choose. */
export interface UserNetworkOptions extends UserNetBackendOptions, NodeSocketsOptions {}

/** User-mode networks on this host's sockets, one for each interface of a guest. */
export const layer = (options: UserNetworkOptions = {}): Layer.Layer<NetBackend> =>
  layerUserNet(options).pipe(Layer.provide(layerSocketsWith(options)), Layer.provide(layerEntropySource))
