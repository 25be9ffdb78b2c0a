//! A back-end under attack, and random numbers for attacks. After each attack the same process must serve a good
//! front-end, without a panic, additional descriptors or leaked memory.

use anyhow::{Context, Result, ensure};

use crate::backend::Rig;
use crate::datapath::Datapath;
use crate::fake_frontend::{Device, Options, features};

/// How much the back-end's anonymous memory may grow over all attacks.
const GROWTH: u64 = 32 << 20;

/// A back-end to attack.
#[derive(Debug)]
pub struct Victim {
    /// The back-end and its TAP.
    pub rig: Rig,
    pid: u32,
    fds: usize,
    resident: u64,
}

impl Victim {
    /// Starts a back-end with one queue pair, and lets it serve one front-end.
    ///
    /// # Errors
    /// Returns an error if the back-end cannot be started or does not work.
    pub fn new(datapath: Datapath) -> Result<Self> {
        let mut rig = Rig::new(datapath, 1, &["--log-level=warn"])?;
        let mut device = rig.device(good_options())?;
        rig.check_traffic(&mut device)?;
        drop(device);
        let fds = rig.backend.fds_at_rest()?;
        let resident = rig.backend.process.resident_bytes()?;
        Ok(Self { pid: rig.backend.process.pid(), fds, resident, rig })
    }

    /// Checks that the back-end serves a good front-end and holds no more than before the attacks.
    ///
    /// # Errors
    /// Returns an error if the back-end is damaged, or holds more descriptors or memory.
    pub fn check(&mut self) -> Result<()> {
        self.rig.backend.check_healthy()?;
        ensure!(self.rig.backend.process.pid() == self.pid, "the back-end is another process");
        // Discards frames that are left from the attack.
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
            "anonymous memory grew to {} KiB from {} KiB",
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

/// Receives the frames that are queued in the TAP, up to one that is sent after them.
fn drain_tap(device: &mut Device) -> Result<()> {
    let last = crate::frames::numbered(0xdead_beef, 60);
    // The test is also on the network side of the TAP.
    crate::packet_socket::PacketSocket::open(crate::backend::TAP)?.send(&last)?;
    loop {
        if device.receive(0)?.1 == last {
            return Ok(());
        }
    }
}

/// A small random number generator (xorshift64*), with which a run can be repeated from its seed.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// Seeds from the environment variable `BATON_FUZZ_SEED`, or else from the clock. Prints the seed.
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

    /// Starts from this seed without printing it, where the run need not be repeatable.
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

    /// Returns a number below `limit`.
    ///
    /// # Panics
    /// Panics if `limit` is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from((self.next_u64() >> 11) % u64::try_from(limit).expect("a limit"))
            .expect("below the limit")
    }

    /// The highest 32 bits of the next number.
    pub fn next_u32(&mut self) -> u32 {
        u32::try_from(self.next_u64() >> 32).unwrap_or_default()
    }

    /// The highest 16 bits of the next number.
    pub fn next_u16(&mut self) -> u16 {
        u16::try_from(self.next_u64() >> 48).unwrap_or_default()
    }

    /// Returns one of the choices.
    ///
    /// # Panics
    /// Panics if there are no choices.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Returns true once in `times` calls on average.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// Returns a number that is likely to be an edge case: small, large, a power of two, or one less.
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
    fn the_same_seed_gives_the_same_numbers() {
        let (mut first, mut second) = (Random(7), Random(7));
        let numbers: Vec<_> = (0..100).map(|_| first.edge()).collect();
        assert_eq!(numbers, (0..100).map(|_| second.edge()).collect::<Vec<_>>());
        assert!((0..1000).all(|_| first.below(3) < 3));
    }
}
