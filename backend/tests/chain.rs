//! Compares the descriptor walk with a plain implementation of virtio 1.2 §2.7.5, for arbitrary chains in guest memory
//! of several regions.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use baton_backend::dataplane::chain::{self, ChainError, Direction, MAX_VECTORS, Vectors};
use baton_backend::memory::{GuestMemory, RegionLayout};
use baton_backend::vring::{RingAddresses, Vring, VringLayout};
use proptest::prelude::*;

const PAGE: u64 = 0x1000;
/// Guest address and number of pages of each region: two adjoin, the third is apart. In the file, and in the
/// front-end's addresses, they follow each other in reverse order.
const REGIONS: [(u64, u64); 3] = [(0, 4), (4 * PAGE, 3), (10 * PAGE, 2)];
const FILE: u64 = 9 * PAGE;
const SIZE: u16 = 16;

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

fn entry(addresses: impl Strategy<Value = u64>) -> impl Strategy<Value = Entry> {
    let length = prop_oneof![4 => 0..200u32, 2 => 0..0x5000u32, 1 => any::<u32>()];
    let table = (0..40u32).prop_map(|count| 16 * count);
    let flags = prop_oneof![6 => Just(1u16), 3 => Just(0), 1 => Just(3), 1 => Just(2), 2 => Just(4), 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addresses, length, table, flags, next).prop_map(|(address, length, table, flags, next)| Entry {
        address,
        length: if flags & 4 == 0 { length } else { table },
        flags,
        next,
    })
}

fn anywhere() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..13 * PAGE, 1 => any::<u64>(), 1 => (0..64u64).prop_map(|rest| u64::MAX - rest)]
}

/// Generates addresses of indirect tables: often near the boundary of two regions, and of any alignment.
fn table_address() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 4 * PAGE - 300..4 * PAGE + 300, 1 => anywhere()]
}

/// Returns the offset of a guest address in the file.
fn in_file(address: u64) -> Option<u64> {
    let mut offset = FILE;
    REGIONS.iter().find_map(|&(base, pages)| {
        offset -= pages * PAGE;
        (address.checked_sub(base)? < pages * PAGE).then(|| offset + address - base)
    })
}

fn write(file: &File, at: u64, entry: Entry) {
    let mut bytes = Vec::new();
    bytes.extend(entry.address.to_le_bytes());
    bytes.extend(entry.length.to_le_bytes());
    bytes.extend(entry.flags.to_le_bytes());
    bytes.extend(entry.next.to_le_bytes());
    for (nth, byte) in (0..).zip(bytes) {
        if let Some(offset) = at.checked_add(nth).and_then(in_file) {
            file.write_all_at(&[byte], offset).unwrap();
        }
    }
}

fn read(file: &File, at: u64) -> Result<Entry, ChainError> {
    let mut bytes = [0u8; 16];
    for (nth, byte) in (0u64..).zip(&mut bytes) {
        let offset = at.checked_add(nth).and_then(in_file).ok_or(ChainError::Address)?;
        file.read_exact_at(std::slice::from_mut(byte), offset).unwrap();
    }
    Ok(Entry {
        address: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
        length: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        flags: u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
        next: u16::from_le_bytes(bytes[14..].try_into().unwrap()),
    })
}

/// Returns the buffers of a chain, split at region boundaries, as offsets and lengths in the file.
fn reference(file: &File, head: u16, writable: bool, indirect: bool) -> Result<Vec<(u64, u64)>, ChainError> {
    let mut pieces = Vec::new();
    let (mut table, mut count, mut within) = (0, u32::from(SIZE), false);
    let (mut index, mut seen, mut length) = (u32::from(head), 0, 0u32);
    loop {
        if seen == count {
            return Err(ChainError::Loop);
        }
        seen += 1;
        let address = 16u64 * u64::from(index);
        let entry = read(file, u64::checked_add(table, address).ok_or(ChainError::Address)?)?;
        if entry.flags & 4 != 0 {
            if within || !indirect || entry.flags & 1 != 0 || entry.length % 16 != 0 || entry.length == 0 {
                return Err(ChainError::Indirect);
            }
            (table, count, within, index, seen) = (entry.address, entry.length / 16, true, 0, 0);
            continue;
        }
        if (entry.flags & 2 != 0) != writable {
            return Err(ChainError::Direction);
        }
        length = length.checked_add(entry.length).ok_or(ChainError::TooLong)?;
        let (mut address, mut rest) = (entry.address, u64::from(entry.length));
        while rest > 0 {
            let offset = in_file(address).ok_or(ChainError::Address)?;
            let &(base, pages) =
                REGIONS.iter().find(|(base, pages)| (*base..base + pages * PAGE).contains(&address)).unwrap();
            let piece = rest.min(base + pages * PAGE - address);
            pieces.push((offset, piece));
            rest -= piece;
            address += piece;
        }
        if entry.flags & 1 == 0 {
            return Ok(pieces);
        }
        index = u32::from(entry.next);
        if index >= count {
            return Err(ChainError::Next);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn chain_walk_matches_the_reference(
        entries in prop::collection::vec(entry(prop_oneof![anywhere(), table_address()]), usize::from(SIZE)),
        place in table_address(),
        table in prop::collection::vec(entry(anywhere()), 0..40),
        first in (prop::option::weighted(0.5, 1..40u32), any::<bool>()),
        head in 0..SIZE,
    ) {
        let (indirect_length, indirect) = first;
        let file = tempfile::tempfile().unwrap();
        file.set_len(FILE).unwrap();
        for (nth, entry) in (0u64..).zip(table) {
            if let Some(at) = place.checked_add(16 * nth) {
                write(&file, at, entry);
            }
        }
        // The descriptor table is at guest address 0.
        for (at, entry) in (0..).step_by(16).zip(entries) {
            write(&file, at, entry);
        }
        if let Some(count) = indirect_length {
            write(&file, 16 * u64::from(head), Entry { address: place, length: 16 * count, flags: 4, next: 0 });
        }
        let regions = REGIONS.map(|(guest_address, pages)| {
            let file_offset = in_file(guest_address).unwrap();
            let layout =
                RegionLayout { guest_address, size: pages * PAGE, user_address: file_offset, file_offset };
            (layout, file.try_clone().unwrap())
        });
        let memory = Arc::new(GuestMemory::map(regions).unwrap());
        let user = in_file(0).unwrap();
        let addresses = RingAddresses { descriptors: user, available: user + PAGE, used: user + 2 * PAGE };
        let layout = VringLayout { size: SIZE, addresses, event_idx: false, indirect };
        let vring = Vring::new(layout, Arc::clone(&memory), None).unwrap();
        let places: Vec<_> =
            REGIONS.iter().map(|&(base, _)| memory.resolve(base, &mut 0).unwrap().0 as u64).collect();

        for (direction, writable) in [(Direction::Readable, false), (Direction::Writable, true)] {
            let mut vectors = Vectors::default();
            let mut hint = 7;
            let result = chain::append(&vring, head, direction, &mut hint, &mut vectors);
            let expected = reference(&file, head, writable, indirect).and_then(|pieces| {
                if pieces.len() > MAX_VECTORS { Err(ChainError::TooLong) } else { Ok(pieces) }
            });
            let found: Vec<_> = vectors
                .0
                .iter()
                .map(|vector| {
                    let pointer = vector.iov_base as u64;
                    let offset = REGIONS.iter().zip(&places).find_map(|(&(base, pages), place)| {
                        let within = pointer.checked_sub(*place)?;
                        (within < pages * PAGE).then(|| in_file(base).unwrap() + within)
                    });
                    (offset.unwrap(), vector.iov_len as u64)
                })
                .collect();
            match (result, expected) {
                (Ok(length), Ok(pieces)) => {
                    prop_assert_eq!(u64::from(length), pieces.iter().map(|piece| piece.1).sum::<u64>());
                    prop_assert_eq!(found, pieces);
                }
                (result, expected) => {
                    prop_assert_eq!(result.err(), expected.err());
                    prop_assert!(found.is_empty());
                }
            }
        }
    }
}
