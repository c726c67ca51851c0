//! Chains per second through the rust-vmm crate virtio-queue: what the benchmark "chains" compares with.
//!
//! For each line `SHAPE ROUNDS` on its input it fills a split queue of 256 entries and lets it be served, ROUNDS times, and prints
//! the nanoseconds of the device's part for each chain. The shapes are those of ChainsWorkload.ts: `one`, `three` and `table`.
//! A chain is taken, each of its buffers is looked up in guest memory, and it is given back; after each round the device asks
//! whether the driver wants an interrupt.
use std::hint::black_box;
use std::io::{self, BufRead, Write};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

const SIZE: u16 = 256;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x5000;
const TABLES: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
const DATA_STRIDE: u64 = 0x2000;
const MEMORY: usize = 0x100_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn descriptor(memory: &GuestMemoryMmap, at: u64, address: u64, length: u32, flags: u16, next: u16) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(length, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

/// A header, data to fill and a status byte.
fn request(memory: &GuestMemoryMmap, table: u64, first: u16, data: u64) {
    let at = table + u64::from(first) * 16;
    descriptor(memory, at, data, 16, NEXT, first + 1);
    descriptor(memory, at + 16, data + 16, 4096, NEXT | WRITE, first + 2);
    descriptor(memory, at + 32, data + 16 + 4096, 1, WRITE, 0);
}

fn main() {
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    println!("0");
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let shape = words.next().unwrap();
        let rounds: u32 = words.next().unwrap().parse().unwrap();
        let entries = if shape == "three" { 3 } else { 1 };
        let chains = SIZE / entries;
        for i in 0..chains {
            let data = DATA + u64::from(i) * DATA_STRIDE;
            match shape {
                "one" => descriptor(&memory, TABLE + u64::from(i) * 16, data, 64, WRITE, 0),
                "three" => request(&memory, TABLE, i * 3, data),
                _ => {
                    let table = TABLES + u64::from(i) * 64;
                    request(&memory, table, 0, data);
                    descriptor(&memory, TABLE + u64::from(i) * 16, table, 48, INDIRECT, 0);
                }
            }
        }
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        memory.write_obj(0u16, GuestAddress(AVAILABLE + 2)).unwrap();
        memory.write_obj(0u16, GuestAddress(USED + 2)).unwrap();
        let mut index: u16 = 0;
        let mut served: u64 = 0;
        let mut interrupts: u32 = 0;
        let mut spent = Duration::ZERO;
        for _ in 0..rounds {
            for i in 0..chains {
                let place = AVAILABLE + 4 + 2 * u64::from(index & (SIZE - 1));
                memory.write_obj(i * entries, GuestAddress(place)).unwrap();
                index = index.wrapping_add(1);
            }
            let wish = AVAILABLE + 4 + 2 * u64::from(SIZE);
            memory.write_obj(index.wrapping_sub(1), GuestAddress(wish)).unwrap();
            memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
            let begun = Instant::now();
            while let Some(chain) = queue.pop_descriptor_chain(&memory) {
                let head = chain.head_index();
                let mut written = 0;
                for descriptor in chain {
                    let slice = memory.get_slice(descriptor.addr(), descriptor.len() as usize);
                    black_box(slice.unwrap());
                    if descriptor.is_write_only() {
                        written += descriptor.len();
                    }
                }
                queue.add_used(&memory, head, written).unwrap();
                served += 1;
            }
            if queue.needs_notification(&memory).unwrap() {
                interrupts += 1;
            }
            spent += begun.elapsed();
        }
        assert_eq!(served, u64::from(rounds) * u64::from(chains));
        assert_eq!(interrupts, rounds);
        println!("{}", spent.as_nanos() as f64 / served as f64);
        io::stdout().flush().unwrap();
    }
}
