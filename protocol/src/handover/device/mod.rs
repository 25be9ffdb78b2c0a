//! How a back-end gives its network device to another one: the TAP's descriptors, what is known of them, and what the
//! front-end negotiated (DESIGN: "Local VM migration").
//!
//! Either the operator arms it (`batonctl … handover PATH --on-suspend`) and the [prologue](super::prologue) comes first,
//! or the front-end asks for *device state* and the first packet is the offer, which brings a `link` to talk on. From the
//! offer on both are the same. Who owns the device is said by the [ownership word](crate::ownership), never by a message:
//!
//! | state (source / target) | owner | own ring starts | the peer is gone | a message is lost, late or bad |
//! |---|---|---|---|---|
//! | prologue | source | nothing to do | source: failed; target: waits again | the same, after 2 s |
//! | armed / ready | source | nothing to do | source: failed, serves on; target: waits again | the same |
//! | offered / not there yet | nobody | source takes back, armed | source takes back, failed | the same |
//! | offered / adopted | nobody | the first one takes; the other drops it | source: takes back, failed; target: keeps it, takes it at its first ring | the same |
//! | offered / adopted, brought by a front-end, which leaves by itself | nobody | source takes back | target: drops it | target: drops it |
//! | offered / adopted, and the source's front-end leaves without having asked how the saving went | source | source takes back, failed | the same | the same |
//! | handed over / taken | target | source: the ring stays still | source: ends; target: nothing | nothing |
//! | armed again / adopted (offer withdrawn, unheard) | source | target: loses the swap, drops it | target: drops it | nothing |
//! | armed again, or offered again / the first offer unread | source, or nobody | source takes back | as armed, or offered | target: lets the old offer go when it reads it, and is ready for the next |
//! | offered / adopted, and both end | nobody | – | whoever sees the other end swaps: one wins, and cleans up | nothing |
//!
//! A message may be read late, the word is always current: the target holds each offer against the word as it is when it
//! reads the offer ([`Word::judge_offer`](crate::ownership::Word::judge_offer)). Where a swap fails on a value that the
//! word cannot have, nothing is the target's.
//!
//! [`source`] and [`target`] are the two ends, [`validate`] checks what the source says
//! ([`DeviceState`](super::wire::device::DeviceState)).

pub mod source;
pub mod target;
pub mod validate;
