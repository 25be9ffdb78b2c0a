//! Wherever one of the two back-ends of a session's hand-over dies, hangs, fails or runs out of descriptors, there is one
//! that serves, as long as one lives which can.

use anyhow::Result;
use baton_tests::datapath::Datapath;
use baton_tests::session_cells::kill::kill_everywhere;

#[test]
fn a_session_survives_whoever_is_killed() -> Result<()> {
    kill_everywhere(Datapath::Userspace, 2)
}
