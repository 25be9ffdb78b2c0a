//! Hands a running session over to another back-end: the front-end's connection, memory, rings and the device. The
//! front-end does not notice.
//!
//! The [ownership word](crate::ownership) decides which back-end owns the session; no message does. **The commit** is
//! the target's swap from `Offered` to `Target`. Before the commit the source is the owner, and on any failure it swaps
//! the word to `Aborted` and continues. After the commit the target is the owner, unless it is *proven* dead before it
//! has settled.
//!
//! | state | the peer is proven dead | the connection ends, or a message is invalid or unexpected | timeout |
//! |---|---|---|---|
//! | source: prologue | ends; the rings never stopped | the same | the same, after 5 s |
//! | source: staging | swaps to `Aborted`, continues | the same | the same, after 10 s |
//! | source: freezing | swaps from `Source` to `Aborted`, continues | the same | the same, 500 ms after the freeze began |
//! | source: committed | swaps from `Offered` to `Aborted`; if it wins, continues; if it loses, swaps from `Target` to `Aborted` and continues from the used indices | if the first swap wins, continues; if it loses, becomes lost | the same, 500 ms after the freeze began |
//! | source: lost | swaps from `Target` to `Aborted` and continues from the used indices; if the word is settled, the session is handed over | waits until the target settles or dies | reads the word every 100 ms |
//! | target: prologue, ready, gathering | waits for another source | the same | the same, after 5 s |
//! | target: staging | finishes staging, then takes the session | finishes staging, then as in staged | none: staging is the target's own work |
//! | target: staged | swaps from `Source` or `Offered` to `Target` and continues from the used indices; if the word is aborted, drops the session | keeps the session until the word is aborted; reads the word every 100 ms | drops the session after 30 s |
//! | target: starting, active | nothing | nothing | nothing |
//!
//! Invariants:
//! - The front-end's messages stay in its socket from before STAGE is built until the word is aborted or settled. So
//!   the staged state stays valid for the target and for a survivor, and every message is read exactly once.
//! - A target settles the word before it reads from the front-end, because the source's state is stale from then on. It
//!   sends ACTIVE before it settles. The source releases the session when the word is settled, with or without ACTIVE.
//!   So the session survives a target that dies before it settles.
//! - A process that was stopped consults the word first when it continues: the source ends the hand-over only by a
//!   swap, and its rings are stopped before the word offers them. A target that sleeps beyond the source's timeout
//!   loses its swap.
//! - Events arrive in this order: the peer's messages, its death, the end of the connection, timeouts.
//!
//! [`source`] and [`target`] are the state machines, [`validate`] checks the source's
//! [`SessionState`](super::wire::session::SessionState), and [`report`] measures the hand-over.

pub mod report;
pub mod source;
pub mod target;
pub mod validate;
