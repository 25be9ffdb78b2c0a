//! A back-end under attack: after whatever was done to it, the same process must serve a good front-end, with as many
//! descriptors as before, no panic, and no memory kept.

use anyhow::{Context, Result, ensure};

use crate::backend::Rig;
use crate::datapath::Datapath;
use crate::fake_frontend::{Device, Options, features};

/// How much memory of its own the process may gain over all attacks.
const GROWTH: u64 = 32 << 20;

/// A back-end to be attacked.
#[derive(Debug)]
pub struct Victim {
    /// It, and its TAP.
    pub rig: Rig,
    pid: u32,
    fds: usize,
    resident: u64,
}

impl Victim {
    /// A back-end with one queue pair that has served once already.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn new(datapath: Datapath) -> Result<Self> {
        let mut rig = Rig::new(datapath, 1, &["--log-level=warn"])?;
        let mut device = rig.device(good_options())?;
        rig.check_traffic(&mut device)?;
        drop(device);
        let fds = rig.backend.fds_at_rest()?;
        let resident = rig.backend.process.resident_bytes()?;
        Ok(Self { pid: rig.backend.process.pid(), fds, resident, rig })
    }

    /// Checks that it is as good as before, with a good front-end and without.
    ///
    /// # Errors
    /// If it is not.
    pub fn check(&mut self) -> Result<()> {
        self.rig.backend.check_healthy()?;
        ensure!(self.rig.backend.process.pid() == self.pid, "another process");
        // What it has not taken of the attack's frames belongs to the attack.
        self.rig.network.drain()?;
        let mut device = self.rig.device(good_options()).context("a good front-end after the attack")?;
        drain_tap(&mut device)?;
        self.rig.network.drain()?;
        self.rig.check_traffic(&mut device).context("a good front-end's traffic after the attack")?;
        drop(device);
        self.rig.backend.fds_at_rest()?;
        self.rig.backend.process.wait_open_fds(self.fds)?;
        let resident = self.rig.backend.process.resident_bytes()?;
        ensure!(
            resident < self.resident + GROWTH,
            "{} KiB of memory of its own, from {} KiB",
            resident >> 10,
            self.resident >> 10
        );
        self.rig.backend.check_healthy()
    }
}

fn good_options() -> Options {
    let features = Options::default().features | features::EVENT_IDX | features::INDIRECT_DESC;
    Options { features, ..Options::default() }
}

/// Takes the frames that wait in the TAP: all of them have arrived once one sent after them has.
fn drain_tap(device: &mut Device) -> Result<()> {
    let last = crate::frames::numbered(0xdead_beef, 60);
    // The network's side is this test's, too.
    crate::packet_socket::PacketSocket::open(crate::backend::TAP)?.send(&last)?;
    loop {
        if device.receive(0)?.1 == last {
            return Ok(());
        }
    }
}

/// A small generator of numbers (xorshift64*), so that a run can be repeated from its seed.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// From the seed in the environment variable `BATON_FUZZ_SEED`, or from the clock. The seed is printed.
    pub fn from_environment() -> Self {
        let clock = || {
            let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            time.map_or(1, |time| u64::from(time.subsec_nanos()) | 1 << 32)
        };
        let seed =
            std::env::var("BATON_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(clock);
        eprintln!("BATON_FUZZ_SEED={seed}");
        Self(seed.max(1))
    }

    /// From this seed, where a run is not to be repeated and so the seed is not printed.
    pub fn seeded(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    ///
    /// # Panics
    /// For a limit of 0.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from((self.next_u64() >> 11) % u64::try_from(limit).expect("a limit"))
            .expect("below the limit")
    }

    /// The lowest 32 bits of the next number.
    pub fn next_u32(&mut self) -> u32 {
        u32::try_from(self.next_u64() >> 32).unwrap_or_default()
    }

    /// The lowest 16 bits of the next number.
    pub fn next_u16(&mut self) -> u16 {
        u16::try_from(self.next_u64() >> 48).unwrap_or_default()
    }

    /// One of these.
    ///
    /// # Panics
    /// If there are none.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Whether this is the one time in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// A number that is likely to be one that matters: small, large, a power of two, or next to one.
    pub fn edge(&mut self) -> u64 {
        match self.below(5) {
            0 => self.next_u64() & 0xff,
            1 => u64::MAX - (self.next_u64() & 0xff),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            _ => self.next_u64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_again() {
        let (mut first, mut second) = (Random(7), Random(7));
        let numbers: Vec<_> = (0..100).map(|_| first.edge()).collect();
        assert_eq!(numbers, (0..100).map(|_| second.edge()).collect::<Vec<_>>());
        assert!((0..1000).all(|_| first.below(3) < 3));
    }
}
