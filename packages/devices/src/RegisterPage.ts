/** What pages of registers hold, for whatever asks although the bus answers reads from the page. */
export const readPage = (page: DataView, offset: number, size: number): number =>
  size === 1 ? page.getUint8(offset) : size === 2 ? page.getUint16(offset, true) : page.getUint32(offset, true)
