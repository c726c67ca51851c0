/** The block device's numbers, by the names of the specification (virtio 1.3, section 5.2). */

/** Device type of the block device. */
export const VIRTIO_ID_BLOCK = 2

/** `size_max` is valid. */
export const VIRTIO_BLK_F_SIZE_MAX = 1
/** `seg_max` is valid. */
export const VIRTIO_BLK_F_SEG_MAX = 2
/** The disk is read-only. */
export const VIRTIO_BLK_F_RO = 5
/** `blk_size` is valid. */
export const VIRTIO_BLK_F_BLK_SIZE = 6
/** There is a flush, and writes are durable only after one. */
export const VIRTIO_BLK_F_FLUSH = 9
/** There is a discard, and its limits are valid. */
export const VIRTIO_BLK_F_DISCARD = 13
/** There is a write of zeros, and its limits are valid. */
export const VIRTIO_BLK_F_WRITE_ZEROES = 14

/** Types of requests. */
export const VirtioBlkType = {
  IN: 0,
  OUT: 1,
  FLUSH: 4,
  GET_ID: 8,
  DISCARD: 11,
  WRITE_ZEROES: 13
} as const

/** What the last byte of a request says. */
export const VirtioBlkStatus = {
  OK: 0,
  IOERR: 1,
  UNSUPP: 2
} as const

/** Length of a request's header: type, 32 reserved bits, sector. */
export const HEADER_SIZE = 16
/** Length of the device's name as GET_ID gives it, padded with zeros. */
export const ID_SIZE = 20
/** Length of one range of a discard or a write of zeros: sector, number of sectors, flags. */
export const RANGE_SIZE = 16
/** In the flags of a range: a write of zeros may give the room up. */
export const RANGE_UNMAP = 1

/** Offsets in the configuration space. */
export const VirtioBlkConfig = {
  capacity: 0,
  sizeMax: 8,
  segMax: 12,
  blkSize: 20,
  maxDiscardSectors: 36,
  maxDiscardSeg: 40,
  discardSectorAlignment: 44,
  maxWriteZeroesSectors: 48,
  maxWriteZeroesSeg: 52,
  writeZeroesMayUnmap: 56
} as const
/** Length of the configuration space, up to and with the limits of the write of zeros. */
export const CONFIG_SIZE = 60

/** The largest size of the queue. */
export const BLOCK_QUEUE_SIZE = 256
/** The most data segments of a request: what a queue holds beside a header and a status. */
export const BLOCK_SEGMENTS_MAX = BLOCK_QUEUE_SIZE - 2
/** The most bytes of a segment that the driver is told to use. */
export const BLOCK_SEGMENT_BYTES_MAX = 0x1_0000
/** The most bytes of a request: what a driver that keeps to the limits can reach. More is an input/output error. */
export const BLOCK_REQUEST_BYTES_MAX = BLOCK_SEGMENTS_MAX * BLOCK_SEGMENT_BYTES_MAX
/** The most requests that a disk works on at a time. The others wait in the queue. */
export const BLOCK_REQUESTS_MAX = 128
/**
 * No further request is begun while this many bytes are being read and written. A back end may need as much memory of its own, and
 * a small guest can ask for much, into the same buffers again and again.
 */
export const BLOCK_BYTES_MAX = 0x400_0000
/** The most requests begun in one turn. */
export const BLOCK_REQUESTS_PER_TURN = 64
/** No further request is begun in a turn once this many bytes were asked for. */
export const BLOCK_BYTES_PER_TURN = 0x20_0000
/** The most ranges of a discard or a write of zeros. */
export const BLOCK_RANGES_MAX = 4
/** The most sectors of such a range: 32 MiB. A back end that keeps tables has bounded work with it. */
export const BLOCK_RANGE_SECTORS_MAX = 0x1_0000
