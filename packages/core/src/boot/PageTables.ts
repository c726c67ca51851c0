/** Page tables that map the first 4 GiB of guest addresses to themselves with 2 MiB pages (Intel SDM volume 3, section 4.5). */
import { PAGE_TABLES_ADDRESS } from "./MachineLayout.ts"

/** Bytes of one table: 512 entries of 8 bytes. */
const TABLE_SIZE = 0x1000
const ENTRY_SIZE = 8
const ENTRIES = TABLE_SIZE / ENTRY_SIZE
/** One page directory maps 1 GiB. */
const DIRECTORIES = 4
const LARGE_PAGE_SIZE = 0x20_0000

const PRESENT = 0x01
const WRITABLE = 0x02
/** In a page directory entry: it maps a 2 MiB page. */
const PAGE_SIZE_BIT = 0x80

/** Bytes of all tables: PML4, PDPT and the page directories. */
export const PAGE_TABLES_SIZE = (2 + DIRECTORIES) * TABLE_SIZE

/** The tables for {@link PAGE_TABLES_ADDRESS}, which is also the value of CR3. */
const makePageTables = (): Uint8Array => {
  const bytes = new Uint8Array(PAGE_TABLES_SIZE)
  const view = new DataView(bytes.buffer)
  const pdpt = TABLE_SIZE
  const directories = 2 * TABLE_SIZE
  view.setUint32(0, (PAGE_TABLES_ADDRESS + pdpt) | PRESENT | WRITABLE, true)
  for (let i = 0; i < DIRECTORIES; i++) {
    const directory = PAGE_TABLES_ADDRESS + directories + i * TABLE_SIZE
    view.setUint32(pdpt + i * ENTRY_SIZE, directory | PRESENT | WRITABLE, true)
  }
  // Every address is below 4 GiB, so the upper half of each entry stays zero.
  for (let i = 0; i < DIRECTORIES * ENTRIES; i++) {
    view.setUint32(directories + i * ENTRY_SIZE, i * LARGE_PAGE_SIZE + (PRESENT | WRITABLE | PAGE_SIZE_BIT), true)
  }
  return bytes
}

/** The tables, made once because they are the same for every machine. To be copied, never written. */
export const PAGE_TABLES: Uint8Array = makePageTables()
