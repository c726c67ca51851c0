/** The version of this package; a test holds it against the manifest. */

/** The version of `@troupe/node`. */
export const version = "0.0.0"
