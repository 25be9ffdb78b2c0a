//! Hands a network device over to another back-end: the TAP's descriptors, their settings, and what the front-end
//! negotiated.
//!
//! Either the operator arms the hand-over (`batonctl … handover PATH --on-suspend`), which begins with the
//! [prologue](super::prologue). Or the front-end asks for *device state*; then the offer is the first packet and
//! carries a `link` for the answers. From the offer on both are the same. The [ownership word](crate::ownership)
//! decides which back-end owns the device; no message does:
//!
//! | state (source / target) | owner | own ring starts | the peer is gone | a message is lost, late or invalid |
//! |---|---|---|---|---|
//! | prologue | source | – | source: failed; target: waits again | the same, after 5 s |
//! | armed / ready | source | – | source: failed, continues to serve; target: waits again | the same |
//! | offered / not received yet | undecided | source: takes back, armed | source: takes back, failed | the same |
//! | offered / adopted | undecided | the first swap wins; the loser drops the device | source: takes back, failed; target: keeps the device and takes it when its first ring starts | the same |
//! | offered / adopted; the front-end that brought the offer disconnects by itself | undecided | source: takes back | target: drops the device | target: drops the device |
//! | offered / adopted; the source's front-end disconnects without `CHECK_DEVICE_STATE` | source | source: takes back, failed | the same | the same |
//! | handed over / taken | target | source: the ring stays stopped | source: ends; target: nothing | nothing |
//! | armed again / adopted (offer withdrawn, RETRACT not received) | source | target: loses its swap, drops the device | target: drops the device | nothing |
//! | armed or offered again / the first offer not read yet | source, or undecided | source: takes back | as armed, or offered | target: ignores the old offer when it reads it, ready for the next |
//! | offered / adopted; both end | undecided | – | a process that sees its peer end swaps; the winner cleans up | nothing |
//!
//! The target may read a message late, but the word is always current: the target checks each offer against the word
//! when it reads the offer ([`Word::judge_offer`](crate::ownership::Word::judge_offer)). If a swap fails because the
//! word has an impossible value, the target owns nothing.
//!
//! [`source`] and [`target`] are the state machines, [`validate`] checks the source's
//! [`DeviceState`](super::wire::device::DeviceState).

pub mod source;
pub mod target;
pub mod validate;
