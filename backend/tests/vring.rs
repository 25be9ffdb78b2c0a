//! A vring against a model of its driver, which shares only the memory with it: any order of steps, from any start
//! index, across the wrap of both indices.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use baton_backend::memory::{GuestMemory, RegionLayout};
use baton_backend::notify::Notifier;
use baton_backend::vring::{RingAddresses, Vring, VringLayout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use proptest::prelude::*;

const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
const MEMORY: u64 = 0x1_0000;

/// The driver, which reads and writes the memory's file.
struct Driver {
    file: File,
    call: EventFd,
    size: u16,
    event_idx: bool,
    /// The driver's available and used index, and the available index at the last decision about a kick.
    added: u16,
    popped: u16,
    decided: u16,
    heads: Vec<u16>,
}

impl Driver {
    fn word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn set_word(&self, at: u64, value: u16) {
        self.file.write_all_at(&value.to_le_bytes(), at).unwrap();
    }

    /// Makes `count` buffers available. Returns whether the driver must kick.
    fn add(&mut self, count: u16) -> bool {
        for _ in 0..count {
            let slot = self.added % self.size;
            let head = self.added.wrapping_mul(7) % self.size;
            self.set_word(AVAILABLE + 4 + 2 * u64::from(slot), head);
            self.heads.push(head);
            self.added = self.added.wrapping_add(1);
        }
        self.set_word(AVAILABLE + 2, self.added);
        let before = std::mem::replace(&mut self.decided, self.added);
        if self.event_idx {
            let event = self.word(USED + 4 + 8 * u64::from(self.size));
            self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(before)
        } else {
            count > 0 && self.word(USED) & 1 == 0
        }
    }

    /// Takes the used buffers back, and checks that they come in order.
    fn pop(&mut self) {
        let used = self.word(USED + 2);
        while self.popped != used {
            let mut element = [0; 8];
            let slot = u64::from(self.popped % self.size);
            self.file.read_exact_at(&mut element, USED + 4 + 8 * slot).unwrap();
            let head = self.heads.remove(0);
            assert_eq!(element[..4], u32::from(head).to_le_bytes());
            assert_eq!(element[4..], (u32::from(head) + 1).to_le_bytes());
            self.popped = self.popped.wrapping_add(1);
        }
    }

    /// Asks for a call for the next used buffer, or for no calls.
    fn want_calls(&self, wanted: bool) {
        if self.event_idx {
            let event = if wanted { self.popped } else { self.popped.wrapping_sub(1) };
            self.set_word(AVAILABLE + 4 + 2 * u64::from(self.size), event);
        } else {
            self.set_word(AVAILABLE, u16::from(!wanted));
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Add(u16),
    Pop,
    WantCalls(bool),
    Complete(u16),
    Publish,
    EnableKicks,
    DisableKicks,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..20u16).prop_map(Step::Add),
        Just(Step::Pop),
        any::<bool>().prop_map(Step::WantCalls),
        (1..20u16).prop_map(Step::Complete),
        Just(Step::Publish),
        Just(Step::EnableKicks),
        Just(Step::DisableKicks),
    ]
}

fn pair(size: u16, start: u16, event_idx: bool) -> (Driver, Vring) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    let layout = RegionLayout { guest_address: 0, size: MEMORY, user_address: 0, file_offset: 0 };
    let memory = GuestMemory::map([(layout, file.try_clone().unwrap())]).unwrap();
    let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    let notifier = {
        use std::os::fd::AsFd;
        Notifier::try_from(File::from(call.as_fd().try_clone_to_owned().unwrap())).unwrap()
    };
    let driver =
        Driver { file, call, size, event_idx, added: start, popped: start, decided: start, heads: vec![] };
    driver.set_word(AVAILABLE + 2, start);
    driver.set_word(USED + 2, start);
    driver.want_calls(false);
    let addresses = RingAddresses { descriptors: DESCRIPTORS, available: AVAILABLE, used: USED };
    let layout = VringLayout { size, addresses, event_idx, indirect: false };
    (driver, Vring::new(layout, Arc::new(memory), Some(notifier)).unwrap())
}

proptest! {
    #[test]
    fn no_buffer_and_no_notification_is_lost(
        (power, start, event_idx) in (0..7u32, prop_oneof![any::<u16>(), 65500..=65535u16], any::<bool>()),
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let size = 1u16 << power;
        let (mut driver, mut vring) = pair(size, start, event_idx);
        // Buffers completed but not published; whether the device sleeps until a kick, and the driver until a call.
        let mut completed = 0u16;
        let (mut device_sleeps, mut driver_sleeps) = (false, false);
        for step in steps {
            let outstanding = driver.added.wrapping_sub(vring.next_available());
            match step {
                Step::Add(count) => {
                    let free = size - driver.added.wrapping_sub(driver.popped);
                    let kick = driver.add(count.min(free));
                    if device_sleeps && free > 0 {
                        prop_assert!(kick, "no kick for new buffers");
                        device_sleeps = false;
                    }
                }
                Step::Pop => {
                    driver.pop();
                    driver_sleeps = false;
                }
                Step::WantCalls(wanted) => {
                    driver.want_calls(wanted);
                    driver_sleeps = wanted && driver.word(USED + 2) == driver.popped;
                }
                Step::Complete(count) => {
                    let available = vring.available(0).unwrap();
                    prop_assert!(available <= outstanding && (available > 0) == (outstanding > 0));
                    for _ in 0..count.min(available) {
                        let head = vring.head(0).unwrap();
                        vring.complete(head, u32::from(head) + 1);
                        completed += 1;
                    }
                }
                Step::Publish => {
                    let called = vring.publish();
                    prop_assert_eq!(called, driver.call.read().is_ok());
                    prop_assert!(completed > 0 || !called, "call without used buffers");
                    if driver_sleeps && completed > 0 {
                        prop_assert!(called, "no call for used buffers");
                        driver_sleeps = false;
                    }
                    completed = 0;
                }
                Step::EnableKicks => {
                    prop_assert_eq!(vring.enable_kicks(0).unwrap() > 0, outstanding > 0);
                    device_sleeps = outstanding == 0;
                }
                Step::DisableKicks => {
                    vring.disable_kicks();
                    device_sleeps = false;
                }
            }
            // The driver sees only published buffers.
            prop_assert_eq!(driver.word(USED + 2), vring.published());
        }
        vring.publish();
        driver.pop();
        prop_assert_eq!(driver.popped, vring.next_available());
    }

    #[test]
    fn invalid_available_index_is_refused(power in 0..7u32, start: u16, index: u16) {
        let size = 1u16 << power;
        let (driver, mut vring) = pair(size, start, false);
        driver.set_word(AVAILABLE + 2, index);
        let distance = index.wrapping_sub(start);
        match vring.available(0) {
            Ok(available) => prop_assert_eq!(available, distance),
            Err(_) => prop_assert!(distance > size),
        }
    }
}
