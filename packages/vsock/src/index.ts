/** The vsock protocol family: the socket device, its endpoints, and who may talk to whom. */
export { layerVsock } from "./Catalog.ts"
export * from "./Cid.ts"
export * from "./VsockManager.ts"
