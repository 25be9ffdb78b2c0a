//! Both datapaths: what is a rule of the protocol is tested with either.
//!
//! A test of that kind is a function of the [`Datapath`], listed in [`on_both_datapaths!`](crate::on_both_datapaths).
//! What the kernel does in another way is said in the test. The kernel's vhost-net is not on every machine, so those
//! tests run in the [`lab`] where it is missing.

use anyhow::Result;

pub use baton_protocol::control::Datapath;

use crate::fake_frontend::wire::protocol;
use crate::lab;

/// The options of `baton-backend` that choose a datapath.
pub fn options(datapath: Datapath) -> &'static [&'static str] {
    match datapath {
        Datapath::Userspace => &[],
        Datapath::VhostNet => &["--vhost"],
    }
}

/// The protocol features that are offered with this datapath only.
pub fn protocol_features(datapath: Datapath) -> u64 {
    match datapath {
        Datapath::Userspace => protocol::INFLIGHT_SHMFD,
        // The kernel notes no chains.
        Datapath::VhostNet => 0,
    }
}

/// What a test's body returns: nothing, or a result.
pub trait Verdict {
    /// As a result.
    ///
    /// # Errors
    /// Its own.
    fn result(self) -> Result<()>;
}

impl Verdict for () {
    fn result(self) -> Result<()> {
        Ok(())
    }
}

impl Verdict for Result<()> {
    fn result(self) -> Self {
        self
    }
}

/// Runs a test's body with a datapath, in the lab if it is the kernel's.
///
/// # Errors
/// The body's and the lab's.
pub fn run<V: Verdict>(datapath: Datapath, body: impl FnOnce(Datapath) -> V) -> Result<()> {
    match datapath {
        Datapath::Userspace => body(datapath).result(),
        Datapath::VhostNet => lab::run(|| body(datapath).result()),
    }
}

/// Makes two tests of each of these functions, which take a [`Datapath`]: `name::userspace` and `name::vhost_net`.
///
/// The second kind runs in the lab, by these names (`.config/nextest.toml`).
#[macro_export]
macro_rules! on_both_datapaths {
    ($($body:ident),+ $(,)?) => {
        $(
            mod $body {
                #[test]
                fn userspace() -> $crate::datapath::TestResult {
                    $crate::datapath::run($crate::datapath::Datapath::Userspace, super::$body)
                }

                #[test]
                fn vhost_net() -> $crate::datapath::TestResult {
                    $crate::datapath::run($crate::datapath::Datapath::VhostNet, super::$body)
                }
            }
        )+
    };
}

/// What such a test returns.
pub type TestResult = Result<()>;
