//! Runs a test with both datapaths.
//!
//! Such a test is a function that takes a [`Datapath`], listed in [`on_both_datapaths!`](crate::on_both_datapaths).
//! The test itself handles what vhost-net does differently. On machines without vhost-net, the tests that need it run
//! in the [`lab`].

use anyhow::Result;

pub use baton_protocol::control::Datapath;

use crate::fake_frontend::wire::protocol;
use crate::lab;

/// The options of `baton-backend` that select a datapath.
pub fn options(datapath: Datapath) -> &'static [&'static str] {
    match datapath {
        Datapath::Userspace => &[],
        Datapath::VhostNet => &["--vhost"],
    }
}

/// The protocol features that the back-end offers only with this datapath.
pub fn protocol_features(datapath: Datapath) -> u64 {
    match datapath {
        Datapath::Userspace => protocol::INFLIGHT_SHMFD,
        // vhost-net does not track inflight chains.
        Datapath::VhostNet => 0,
    }
}

/// The return type of a test's body: nothing, or a result.
pub trait Verdict {
    /// Converts it to a result.
    ///
    /// # Errors
    /// Returns the error of the test's body.
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

/// Runs a test's body with a datapath: through [`lab::run`] if the datapath is vhost-net.
///
/// # Errors
/// Returns the errors of the body and of the lab.
pub fn run<V: Verdict>(datapath: Datapath, body: impl FnOnce(Datapath) -> V) -> Result<()> {
    match datapath {
        Datapath::Userspace => body(datapath).result(),
        Datapath::VhostNet => lab::run(|| body(datapath).result()),
    }
}

/// Defines two tests for each of these functions, which take a [`Datapath`]: `name::userspace` and `name::vhost_net`.
///
/// `.config/nextest.toml` recognises the tests that may run in the lab by the second name.
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

/// The return type of such a test.
pub type TestResult = Result<()>;
