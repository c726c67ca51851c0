/** Numbers of the console device by the names of the specification (virtio 1.3, section 5.3). */

/** Device type of the console. */
export const VIRTIO_ID_CONSOLE = 3
/** The size of the terminal is in the configuration space. */
export const VIRTIO_CONSOLE_F_SIZE = 0
/** There can be more than one port, and there are queues for messages about them. */
export const VIRTIO_CONSOLE_F_MULTIPORT = 1
/** Single bytes can be written through the configuration space. */
export const VIRTIO_CONSOLE_F_EMERG_WRITE = 2

/** Offsets of the fields of `struct virtio_console_config` (section 5.3.4). */
export const ConsoleConfig = { cols: 0, rows: 2, max_nr_ports: 4, emerg_wr: 8 } as const
/** Size of `struct virtio_console_config` in bytes. */
export const CONSOLE_CONFIG_SIZE = 12

/** The kinds of messages about ports (section 5.3.6.2). */
export const ConsoleEvent = {
  DEVICE_READY: 0,
  DEVICE_ADD: 1,
  DEVICE_REMOVE: 2,
  PORT_READY: 3,
  CONSOLE_PORT: 4,
  RESIZE: 5,
  PORT_OPEN: 6,
  PORT_NAME: 7
} as const
/** Size of `struct virtio_console_control` in bytes. */
export const CONTROL_SIZE = 8
/** Offsets in it. */
export const Control = { id: 0, event: 4, value: 6 } as const

/** The largest size of each queue. */
export const CONSOLE_QUEUE_SIZE = 64
/** The queue of messages to the driver. */
export const QUEUE_CONTROL_RX = 2
/** The queue of messages from the driver. */
export const QUEUE_CONTROL_TX = 3
/** The queue into which input of a port goes. */
export const receiveQueue = (port: number): number => port === 0 ? 0 : 2 + 2 * port
/** The queue from which output of a port comes. */
export const transmitQueue = (port: number): number => receiveQueue(port) + 1
/** The number of queues of a device for so many ports. */
export const queueCount = (ports: number): number => ports === 1 ? 2 : 2 + 2 * ports
