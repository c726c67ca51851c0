/** Numbers of the network device (virtio 1.3, section 5.1): features, queues, configuration, the header of a frame, commands. */

/** Device type of the network device. */
export const VIRTIO_ID_NET = 1

/** Feature bits (section 5.1.3). */
export const NetFeature = {
  CSUM: 0,
  GUEST_CSUM: 1,
  CTRL_GUEST_OFFLOADS: 2,
  MTU: 3,
  MAC: 5,
  GUEST_TSO4: 7,
  GUEST_TSO6: 8,
  GUEST_ECN: 9,
  GUEST_UFO: 10,
  HOST_TSO4: 11,
  HOST_TSO6: 12,
  HOST_ECN: 13,
  HOST_UFO: 14,
  MRG_RXBUF: 15,
  STATUS: 16,
  CTRL_VQ: 17,
  CTRL_RX: 18,
  CTRL_VLAN: 19,
  CTRL_RX_EXTRA: 20,
  GUEST_ANNOUNCE: 21,
  MQ: 22,
  CTRL_MAC_ADDR: 23,
  GUEST_USO4: 54,
  GUEST_USO6: 55,
  HOST_USO: 56
} as const

/** The queues (section 5.1.2), of a device without VIRTIO_NET_F_MQ. */
export const NetQueue = { RECEIVE: 0, TRANSMIT: 1, CONTROL: 2 } as const

/** Offsets in the configuration space (section 5.1.4). */
export const NetConfig = { MAC: 0, STATUS: 6, MAX_VIRTQUEUE_PAIRS: 8, MTU: 10 } as const
/** Bytes of the configuration space up to the MTU. */
export const NET_CONFIG_SIZE = 12
/** In the status: the link is up. */
export const VIRTIO_NET_S_LINK_UP = 1

/** Size of `struct virtio_net_hdr` in bytes (section 5.1.6). */
export const NET_HEADER_SIZE = 12
/** Offsets in the header. */
export const NetHeader = {
  FLAGS: 0,
  GSO_TYPE: 1,
  HDR_LEN: 2,
  GSO_SIZE: 4,
  CSUM_START: 6,
  CSUM_OFFSET: 8,
  NUM_BUFFERS: 10
} as const
/** In the header's GSO type: the segments have explicit congestion notification. */
export const VIRTIO_NET_HDR_GSO_ECN = 0x80

/** Classes of commands (section 5.1.6.5). */
export const ControlClass = { RX: 0, MAC: 1, VLAN: 2, ANNOUNCE: 3, MQ: 4, GUEST_OFFLOADS: 5 } as const
/** Commands of {@link ControlClass.RX}. */
export const RxCommand = { PROMISC: 0, ALLMULTI: 1, ALLUNI: 2, NOMULTI: 3, NOUNI: 4, NOBCAST: 5 } as const
/** Commands of {@link ControlClass.MAC}. */
export const MacCommand = { TABLE_SET: 0, ADDR_SET: 1 } as const
/** Commands of {@link ControlClass.GUEST_OFFLOADS}. */
export const OffloadsCommand = { SET: 0 } as const
/** Answers to commands. */
export const VIRTIO_NET_OK = 0
/** The command was refused. */
export const VIRTIO_NET_ERR = 1
