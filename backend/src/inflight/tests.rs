//! A back-end is killed between any two of its stores, and the next one recovers.

use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use proptest::prelude::*;

use super::*;
use crate::memory::{GuestMemory, RegionLayout};
use crate::vring::{RingAddresses, Vring, VringLayout};

const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const MEMORY: u64 = 0x3000;
/// The region has room for more than the vring needs, and the vring is not its first.
const QUEUES: u16 = 3;
const ENTRIES: u16 = 40;
const INDEX: usize = 2;

thread_local! {
    /// Stores until this thread is killed.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The panic payload of a killed thread.
struct Killed;

/// Counts a store, and kills the thread after the last one.
pub fn step() {
    if let Some(left) = LEFT.get() {
        if left == 0 {
            LEFT.set(None);
            resume_unwind(Box::new(Killed));
        }
        LEFT.set(Some(left - 1));
    }
}

/// Runs `action` and kills it after `stores` stores, if it makes more.
fn killed_after(stores: u32, action: impl FnOnce()) {
    LEFT.set(Some(stores));
    if let Err(reason) = catch_unwind(AssertUnwindSafe(action))
        && !reason.is::<Killed>()
    {
        resume_unwind(reason);
    }
    LEFT.set(None);
}

/// The files of the ring's memory and of the region, and the driver's state.
struct World {
    memory: File,
    region: File,
    region_size: u64,
    size: u16,
    added: u16,
    popped: u16,
    /// Chains that the driver made available and has not got back, oldest first.
    heads: Vec<u16>,
    free: Vec<u16>,
}

impl World {
    fn new(size: u16, start: u16) -> Self {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(MEMORY).unwrap();
        let (region, region_size) = create(QUEUES, ENTRIES).unwrap();
        let free = (0..size).rev().collect();
        let world =
            Self { memory, region, region_size, size, added: start, popped: start, heads: vec![], free };
        world.memory.write_all_at(&start.to_le_bytes(), AVAILABLE + 2).unwrap();
        world.memory.write_all_at(&start.to_le_bytes(), USED + 2).unwrap();
        world
    }

    fn word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Makes buffers available.
    fn add(&mut self, count: u16) {
        for _ in 0..count {
            // In an arbitrary order.
            let Some(middle) = self.free.len().checked_sub(1).map(|last| last / 2) else { break };
            let head = self.free.remove(middle);
            let slot = u64::from(self.added % self.size);
            self.memory.write_all_at(&head.to_le_bytes(), AVAILABLE + 4 + 2 * slot).unwrap();
            self.heads.push(head);
            self.added = self.added.wrapping_add(1);
        }
        self.memory.write_all_at(&self.added.to_le_bytes(), AVAILABLE + 2).unwrap();
    }

    /// Takes back the used buffers, and checks that each was made available and is returned once. Returns whether they
    /// came in order.
    fn pop(&mut self) -> bool {
        let mut in_order = true;
        while self.popped != self.word(USED + 2) {
            let mut element = [0; 8];
            let slot = u64::from(self.popped % self.size);
            self.memory.read_exact_at(&mut element, USED + 4 + 8 * slot).unwrap();
            let head = u16::try_from(u32::from_le_bytes(*element.first_chunk().unwrap())).unwrap();
            let place = self.heads.iter().position(|other| *other == head);
            let place = place.unwrap_or_else(|| panic!("head {head} was not available, or came back twice"));
            in_order &= place == 0;
            self.heads.remove(place);
            self.free.push(head);
            self.popped = self.popped.wrapping_add(1);
        }
        in_order
    }

    fn queue(&self) -> InflightQueue {
        let region = self.region.try_clone().unwrap();
        let region = InflightRegion::new(region, 0, self.region_size, QUEUES, ENTRIES).unwrap();
        InflightQueue::new(&Arc::new(region), INDEX, self.size).unwrap()
    }

    /// Creates a back-end's vring that has not read the region yet.
    fn fresh_vring(&self) -> Vring {
        let layout = RegionLayout { guest_address: 0, size: MEMORY, user_address: 0, file_offset: 0 };
        let memory = GuestMemory::map([(layout, self.memory.try_clone().unwrap())]).unwrap();
        let addresses = RingAddresses { descriptors: 0, available: AVAILABLE, used: USED };
        let layout = VringLayout { size: self.size, addresses, event_idx: false, indirect: false };
        Vring::new(layout, Arc::new(memory), None).unwrap()
    }

    fn vring(&self) -> Vring {
        let mut vring = self.fresh_vring();
        vring.set_inflight(self.queue());
        vring
    }

    /// Returns the chains in flight according to the region, which must be valid if it has been used.
    fn leftovers(&self) -> Vec<u16> {
        let mut queue = self.queue();
        if queue.version().load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        queue.leftovers(self.word(USED + 2), self.word(AVAILABLE + 2)).unwrap()
    }

    /// Returns the offset of the part of vring [`INDEX`].
    fn part() -> u64 {
        // A part has 16 + 16 * 40 bytes, rounded up to 64.
        2 * 704
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        self.region.write_all_at(bytes, Self::part() + at).unwrap();
    }

    fn peek<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.region.read_exact_at(&mut bytes, Self::part() + at).unwrap();
        bytes
    }
}

/// Completes up to `count` buffers and publishes them.
fn batch(vring: &mut Vring, count: u16) -> u16 {
    let count = vring.available(0).unwrap().min(count);
    for _ in 0..count {
        let head = vring.head(0).unwrap();
        vring.complete(head, 0);
    }
    vring.publish();
    count
}

/// Completes everything, checks that nothing is in flight then, and returns whether the buffers came back in order.
fn finish(world: &mut World) -> bool {
    let mut vring = world.vring();
    while batch(&mut vring, 3) > 0 {}
    let in_order = world.pop();
    assert!(world.heads.is_empty());
    assert!(world.leftovers().is_empty());
    in_order
}

/// Generates any start index, but often one just before the indices wrap.
fn start() -> impl Strategy<Value = u16> {
    prop_oneof![any::<u16>(), 65500..=65535u16]
}

proptest! {
    #[test]
    fn kill_at_any_store_loses_nothing_and_completes_nothing_twice(
        (power, start) in (0..6u32, start()),
        rounds in prop::collection::vec((0..20u16, 1..20u16, prop::option::of(0..120u32)), 1..40),
    ) {
        let mut world = World::new(1 << power, start);
        let mut vring = world.vring();
        for (add, complete, kill) in rounds {
            world.add(add);
            killed_after(kill.unwrap_or(u32::MAX), || {
                batch(&mut vring, complete);
            });
            prop_assert!(world.pop());
            if kill.is_some() {
                // The chains in flight are the oldest that the driver waits for.
                let leftovers = world.leftovers();
                prop_assert!(world.heads.starts_with(&leftovers), "{:?} of {:?}", leftovers, world.heads);
                vring = world.vring();
                prop_assert_eq!(vring.base(), vring.published());
            }
        }
        drop(vring);
        prop_assert!(finish(&mut world));
    }

    #[test]
    fn chains_left_in_any_order_are_completed_once(
        (power, start) in (0..6u32, start()),
        rounds in prop::collection::vec((0..20u16, 0..20u16, prop::collection::vec(any::<prop::sample::Index>(), 0..10)), 1..10),
        kill in 0..400usize,
        (meanwhile, base_is_used) in (0..20u16, any::<bool>()),
    ) {
        let mut world = World::new(1 << power, start);
        drop(world.vring());
        let mut other = OutOfOrder { left: kill, taken: vec![], available: start, used: start, counter: 7, last: 0 };
        for (add, take, complete) in rounds {
            world.add(add);
            if other.run(&world, take, &complete).is_none() {
                break;
            }
            world.pop();
        }
        world.pop();
        let leftovers = world.leftovers();
        let count = u16::try_from(leftovers.len()).unwrap();
        let mut vring = world.fresh_vring();
        // A front-end may count these as taken, or not.
        let used = vring.published();
        vring.set_next_available(used.wrapping_add(if base_is_used { 0 } else { count }));
        vring.set_inflight(world.queue());
        prop_assert_eq!(vring.next_available(), used);
        // In the order in which the other back-end took them.
        let expected: Vec<_> = world.heads.iter().filter(|head| leftovers.contains(head)).copied().collect();
        prop_assert_eq!(&leftovers, &expected);
        let base = vring.base();
        prop_assert!(base == used || base == used.wrapping_add(count));
        // The ring may stop half-way, and more buffers may become available.
        batch(&mut vring, meanwhile);
        drop(vring);
        world.pop();
        world.add(meanwhile);
        finish(&mut world);
    }

    #[test]
    fn invalid_region_is_harmless(
        (power, start) in (0..6u32, start()),
        version in prop_oneof![4 => Just(1u16), 1 => any::<u16>()],
        used in prop_oneof![2 => 0..40u16, 1 => any::<u16>()],
        (add, last) in (0..40u16, any::<u16>()),
        states in prop::collection::vec((0..3u8, 0..50u16, 0..10u64), usize::from(ENTRIES)),
    ) {
        let mut world = World::new(1 << power, start);
        world.add(add);
        world.poke(8, &version.to_ne_bytes());
        world.poke(12, &last.to_ne_bytes());
        world.poke(14, &start.wrapping_sub(used).to_ne_bytes());
        for (at, (inflight, next, counter)) in (16..).step_by(16).zip(states) {
            world.poke(at, &[inflight]);
            world.poke(at + 6, &next.to_ne_bytes());
            world.poke(at + 8, &counter.to_ne_bytes());
        }
        let mut vring = world.vring();
        prop_assert_eq!(vring.available(0).unwrap(), world.added.wrapping_sub(start));
        prop_assert_eq!(vring.published(), start);
        // Every chain is a valid one of the ring, and the region is valid from here on.
        let count = world.heads.len();
        prop_assert_eq!(usize::from(batch(&mut vring, u16::MAX)), count);
        drop(vring);
        prop_assert!(world.leftovers().is_empty());
    }
}

/// Another back-end, which completes in any order and is killed after `left` stores.
struct OutOfOrder {
    left: usize,
    taken: Vec<u16>,
    available: u16,
    used: u16,
    counter: u64,
    last: u16,
}

impl OutOfOrder {
    fn store(&mut self, file: &File, at: u64, bytes: &[u8]) -> Option<()> {
        self.left = self.left.checked_sub(1)?;
        file.write_all_at(bytes, at).unwrap();
        Some(())
    }

    /// Takes some chains and completes some of those that it has, as the specification describes. Returns `None` when
    /// killed.
    fn run(&mut self, world: &World, take: u16, complete: &[prop::sample::Index]) -> Option<()> {
        let part = World::part();
        let state = |head: u16| part + 16 + 16 * u64::from(head);
        for _ in 0..take.min(world.added.wrapping_sub(self.available)) {
            let slot = u64::from(self.available % world.size);
            let head = world.word(AVAILABLE + 4 + 2 * slot);
            self.store(&world.region, state(head) + 8, &self.counter.to_ne_bytes())?;
            self.counter += 1;
            self.store(&world.region, state(head), &[1])?;
            self.available = self.available.wrapping_add(1);
            self.taken.push(head);
        }
        let mut batch = vec![];
        for index in complete {
            if self.taken.is_empty() {
                break;
            }
            let head = self.taken.remove(index.index(self.taken.len()));
            let slot = u64::from(self.used % world.size);
            let element = [u32::from(head), 0].map(u32::to_le_bytes).concat();
            self.store(&world.memory, USED + 4 + 8 * slot, &element)?;
            self.used = self.used.wrapping_add(1);
            self.store(&world.region, state(head) + 6, &self.last.to_ne_bytes())?;
            self.last = head;
            self.store(&world.region, part + 12, &head.to_ne_bytes())?;
            batch.push(head);
        }
        self.store(&world.memory, USED + 2, &self.used.to_le_bytes())?;
        for head in batch {
            self.store(&world.region, state(head), &[0])?;
        }
        self.store(&world.region, part + 14, &self.used.to_ne_bytes())
    }
}

#[test]
fn layout_matches_the_specification() {
    let mut world = World::new(16, 5);
    assert_eq!(world.region_size, 3 * 704);
    assert!(world.region.set_len(0).is_err(), "the region can be truncated");
    world.add(3);
    let mut vring = world.vring();
    for _ in 0..3 {
        let head = vring.head(0).unwrap();
        vring.complete(head, 0);
    }
    let numbers = |world: &World| {
        world.peek::<16>(0).as_chunks().0.iter().map(|b| u16::from_ne_bytes(*b)).collect::<Vec<_>>()
    };
    let [first, second, third] = world.heads[..] else { panic!() };
    // No features, version, number of descriptors, last batch head, used index.
    assert_eq!(numbers(&world), [0, 0, 0, 0, 1, ENTRIES, third, 5]);
    for (counter, head, next) in [(0u64, first, 0), (1, second, first), (2, third, second)] {
        let state: [u8; 16] = world.peek(16 + 16 * u64::from(head));
        assert_eq!((state[0], u16::from_ne_bytes([state[6], state[7]])), (1, next));
        assert_eq!(state[8..], counter.to_ne_bytes());
    }
    vring.publish();
    assert_eq!(numbers(&world), [0, 0, 0, 0, 1, ENTRIES, third, 8]);
    for head in [first, second, third] {
        assert_eq!(world.peek(16 + 16 * u64::from(head)), [0]);
    }
    // The other queues' parts are unchanged.
    let mut others = [0; 1408];
    world.region.read_exact_at(&mut others, 0).unwrap();
    assert_eq!(others, [0; 1408]);
}

#[test]
fn invalid_region_is_reported_and_reset() {
    let error = |poke: &dyn Fn(&World)| {
        let mut world = World::new(8, 100);
        world.add(8);
        drop(world.vring());
        poke(&world);
        let mut queue = world.queue();
        let result = queue.leftovers(100, 108);
        // Recovery resets the region.
        assert!(queue.recover(100, 108).is_empty());
        assert_eq!(queue.leftovers(100, 108), Ok(vec![]));
        result.unwrap_err()
    };
    let set = |world: &World, at: u64, value: u16| world.poke(at, &value.to_ne_bytes());
    assert_eq!(error(&|w| set(w, 14, 91)), Nonsense::UsedIndex { noted: 91, used: 100 });
    assert_eq!(error(&|w| set(w, 14, 101)), Nonsense::UsedIndex { noted: 101, used: 100 });
    // A list that leaves the table, and a circular one.
    let outside = |w: &World| {
        set(w, 14, 98);
        set(w, 12, 3);
        set(w, 16 + 16 * 3 + 6, 8);
    };
    assert_eq!(error(&outside), Nonsense::Batch(2));
    let round = |w: &World| {
        set(w, 14, 97);
        set(w, 12, 3);
        set(w, 16 + 16 * 3 + 6, 4);
        set(w, 16 + 16 * 4 + 6, 3);
    };
    assert_eq!(error(&round), Nonsense::Batch(3));

    let mut world = World::new(8, 100);
    world.add(1);
    drop(world.vring());
    world.poke(16, &[1]);
    world.poke(16 + 16, &[1]);
    let result = world.queue().leftovers(100, 101);
    assert_eq!(result, Err(Nonsense::TooMany { inflight: 2, available: 1 }));
}

#[test]
fn vring_without_room_in_the_region_is_not_tracked() {
    let world = World::new(8, 0);
    let region = world.region.try_clone().unwrap();
    let region = Arc::new(InflightRegion::new(region, 0, world.region_size, QUEUES, ENTRIES).unwrap());
    assert!(InflightQueue::new(&region, 3, 8).is_none());
    assert!(InflightQueue::new(&region, usize::MAX, 8).is_none());
    assert!(InflightQueue::new(&region, 2, 64).is_none());
    assert!(InflightQueue::new(&region, 2, 32).is_some());
}

#[test]
fn region_smaller_than_its_queues_is_refused() {
    let refused = |offset, size, queues, entries| {
        let (file, _) = create(QUEUES, ENTRIES).unwrap();
        InflightRegion::new(file, offset, size, queues, entries).unwrap_err()
    };
    for (size, queues, entries) in [(3 * 704 - 1, 3, 40), (3 * 704, 4, 40), (3 * 704, 3, 44), (0, 1, 1)] {
        assert!(matches!(refused(0, size, queues, entries), InflightError::TooSmall { .. }));
    }
    assert!(matches!(refused(0, u64::MAX, u16::MAX, u16::MAX), InflightError::Mapping(_)));
    assert!(matches!(refused(0x1000, 3 * 704, 3, 40), InflightError::Mapping(_)));
    assert!(matches!(refused(8, 704, 1, 40), InflightError::Mapping(_)));
}
