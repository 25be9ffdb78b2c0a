//! The complete fault matrix with either datapath: the four processes of a local migration, and the two of a session's
//! hand-over. `make soak` runs it `SOAK_ROUNDS` times.

use anyhow::{Context, Result};
use baton_tests::fault_matrix::device::hang::hang_everywhere as migration_tolerates_hangs;
use baton_tests::fault_matrix::device::kill::{kill_guests, kill_others};
use baton_tests::fault_matrix::device::refuse::refuse_everywhere as migration_tolerates_failed_steps;
use baton_tests::fault_matrix::device::starve::starve_everywhere as migration_tolerates_lack_of_descriptors;
use baton_tests::fault_matrix::session;
use baton_tests::local_migration::Kind;
use baton_tests::{datapath, lab};

fn rounds(datapath: datapath::Datapath, body: impl Fn(Kind) -> Result<()>) -> Result<()> {
    let rounds = std::env::var("SOAK_ROUNDS").unwrap_or_else(|_| "1".to_owned());
    let rounds: u32 = rounds.parse().with_context(|| format!("SOAK_ROUNDS={rounds} is not a number"))?;
    lab::run(|| {
        (0..rounds).try_for_each(|round| {
            body(Kind { datapath, queue_pairs: 2 }).with_context(|| format!("round {round}"))
        })
    })
}

fn migration_tolerates_kills(kind: Kind) -> Result<()> {
    kill_others(kind)?;
    kill_guests(kind)
}

fn session_tolerates_kills(kind: Kind) -> Result<()> {
    session::kill::kill_everywhere(kind.datapath, kind.queue_pairs)
}

fn session_tolerates_hangs(kind: Kind) -> Result<()> {
    session::hang::hang_everywhere(kind.datapath, kind.queue_pairs)?;
    session::hang::oversleep_everywhere(kind.datapath, kind.queue_pairs)
}

fn session_tolerates_lack_of_descriptors(kind: Kind) -> Result<()> {
    session::starve::starve_everywhere(kind.datapath, kind.queue_pairs)?;
    session::refuse::refuse_everywhere(kind.datapath, kind.queue_pairs)
}

/// Makes a test per datapath of each function. `make test` leaves these tests out.
macro_rules! soaks {
    ($($body:ident),+) => {
        $(mod $body {
            use baton_tests::datapath::Datapath;

            #[test]
            #[ignore = "takes minutes: make soak"]
            fn userspace() -> anyhow::Result<()> {
                super::rounds(Datapath::Userspace, super::$body)
            }

            #[test]
            #[ignore = "takes minutes: make soak"]
            fn vhost_net() -> anyhow::Result<()> {
                super::rounds(Datapath::VhostNet, super::$body)
            }
        })+
    };
}

soaks!(
    migration_tolerates_kills,
    migration_tolerates_hangs,
    migration_tolerates_lack_of_descriptors,
    migration_tolerates_failed_steps,
    session_tolerates_kills,
    session_tolerates_hangs,
    session_tolerates_lack_of_descriptors
);
