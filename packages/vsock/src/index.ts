/** The vsock protocol family: addresses so far. The socket device and its endpoints are built on them. */
export * from "./Cid.ts"
