//! All fault points.

/// Who has a fault point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// The VMM that gives a VM away.
    SourceVmm,
    /// The VMM that takes it.
    TargetVmm,
    /// The back-end that gives a device away.
    SourceBackend,
    /// The back-end that takes it.
    TargetBackend,
    /// The back-end that gives a running session away.
    SourceSession,
    /// The back-end that takes it.
    TargetSession,
}

/// What a worker is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// Frames are in the guest's memory, and it was not told of them.
    Received,
    /// Frames have gone out, and the guest was not told.
    Sent,
}

macro_rules! points {
    ($($party:ident $prefix:literal { $($(#[$doc:meta])* $point:ident = $name:literal $(, $fails:ident)?;)* })*) => {
        /// A fault point.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Point {
            $($($(#[$doc])* $point,)*)*
        }

        impl Point {
            /// All of them, in the order in which they are reached.
            pub const ALL: &[Self] = &[$($(Self::$point,)*)*];

            /// Its name in `BATON_FAULT`.
            pub fn name(self) -> &'static str {
                match self {
                    $($(Self::$point => concat!($prefix, "/", $name),)*)*
                }
            }

            /// Who comes by.
            pub fn party(self) -> Party {
                match self {
                    $($(Self::$point => Party::$party,)*)*
                }
            }

            /// Whether something can fail there.
            pub fn fails(self) -> bool {
                match self {
                    $($(Self::$point => points!(@ $($fails)?),)*)*
                }
            }
        }
    };
    (@ fails) => { true };
    (@) => { false };
}

points! {
    SourceVmm "source-vmm" {
        /// Connected to the target, and nothing was said.
        SourceVmmConnected = "connected", fails;
        /// The target would take the VM.
        SourceVmmGreeted = "greeted", fails;
        /// The target is prepared; the VM runs.
        SourceVmmPrepared = "prepared", fails;
        /// The vCPUs stand still.
        SourceVmmVcpusStopped = "vcpus-stopped", fails;
        /// The rings, too.
        SourceVmmRingsStopped = "rings-stopped", fails;
        /// The back-ends have offered the TAPs that go along.
        SourceVmmDevicesOffered = "devices-offered", fails;
        /// The VM's state is known, and not sent.
        SourceVmmSaved = "saved", fails;
        /// It was sent.
        SourceVmmStateSent = "state-sent", fails;
        /// The target has all; nothing is committed.
        SourceVmmReady = "ready", fails;
        /// The word is offered: the commit point is passed, and COMMIT was not sent.
        SourceVmmOffered = "offered", fails;
        /// COMMIT was sent.
        SourceVmmCommitSent = "commit-sent";
        /// The VM is known to be the target's.
        SourceVmmCompleted = "completed";
    }
    TargetVmm "target-vmm" {
        /// A source has connected.
        TargetVmmConnected = "connected", fails;
        /// The source's VM would fit; the source was not told.
        TargetVmmGreeted = "greeted", fails;
        /// Guest memory is shared with KVM and the back-ends; the source was not told.
        TargetVmmPrepared = "prepared", fails;
        /// The VM's state has come.
        TargetVmmStateReceived = "state-received", fails;
        /// The back-ends have adopted the TAPs that came along.
        TargetVmmDevicesAdopted = "devices-adopted", fails;
        /// All is restored; the source was not told.
        TargetVmmRestored = "restored", fails;
        /// COMMIT has come; the word is still only offered.
        TargetVmmCommitting = "committing", fails;
        /// The VM is taken, and stands still.
        TargetVmmTaken = "taken";
        /// It runs; the source was not told.
        TargetVmmResumed = "resumed";
    }
    SourceBackend "source-backend" {
        /// The front-end has asked for the device's state.
        SourceBackendSaving = "saving", fails;
        /// The TAP is put aside, and the word still the source's.
        SourceBackendTapAside = "tap-aside";
        /// The word is offered; nothing was sent.
        SourceBackendOffered = "offered", fails;
        /// The offer was sent; the front-end was not told.
        SourceBackendOfferSent = "offer-sent";
        /// The target holds the TAP.
        SourceBackendAdopted = "adopted";
        /// The TAP is the target's, and still open here.
        SourceBackendHandedOver = "handed-over";
    }
    TargetBackend "target-backend" {
        /// The front-end gives the device's state.
        TargetBackendLoading = "loading", fails;
        /// The offer has come, and was not looked at.
        TargetBackendOfferReceived = "offer-received", fails;
        /// The TAP is held, untouched; nobody was told.
        TargetBackendAdopted = "adopted";
        /// A ring has started; the word is still only offered.
        TargetBackendTaking = "taking";
        /// The TAP is taken, and not used.
        TargetBackendTaken = "taken";
        /// It is used; the source was not told.
        TargetBackendActive = "active";
    }
    SourceSession "source-session" {
        /// Connected to the target, of which nothing is known.
        SourceSessionConnected = "connected", fails;
        /// The target has answered, and was not told of the session.
        SourceSessionGreeted = "greeted";
        /// The target would take the session, of which nothing was staged; the front-end is left alone.
        SourceSessionReady = "ready", fails;
        /// STAGE was sent, and of the descriptors only the first packet.
        SourceSessionStageSent = "stage-sent";
        /// The target has all; the rings run.
        SourceSessionStaged = "staged";
        /// The rings are stopped; the word is still the source's.
        SourceSessionFrozen = "frozen", fails;
        /// The word is offered; COMMIT was not sent.
        SourceSessionOffered = "offered";
        /// COMMIT was sent.
        SourceSessionCommitSent = "commit-sent";
        /// The session is known to be the target's, and still open here.
        SourceSessionHandedOver = "handed-over";
        /// It is closed; whoever asked was not told.
        SourceSessionReleased = "released";
    }
    TargetSession "target-session" {
        /// A source has said hello, and nothing is known of it.
        TargetSessionArrived = "arrived", fails;
        /// The session could be taken; the source was not told.
        TargetSessionJudged = "judged";
        /// STAGE has come, and more descriptors are on their way.
        TargetSessionGathering = "gathering";
        /// All descriptors are here; nothing was made of them.
        TargetSessionGathered = "gathered", fails;
        /// Everything is ready, untouched; the source was not told.
        TargetSessionStaged = "staged";
        /// The source was told.
        TargetSessionStagedSent = "staged-sent";
        /// The session is to be taken; the word is not the target's yet.
        TargetSessionTaking = "taking";
        /// The word is the target's; no ring runs.
        TargetSessionTaken = "taken";
        /// The rings run; the source was not told.
        TargetSessionRunning = "running";
        /// The source was told; the word is not settled.
        TargetSessionActiveSent = "active-sent";
        /// The word is settled; the front-end was not heard.
        TargetSessionSettled = "settled";
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_name_is_its_own_and_in_the_map() {
        let names: HashSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        let map = include_str!("../../ARCHITECTURE.md");
        for point in Point::ALL {
            let (party, state) = point.name().split_once('/').unwrap();
            let line = map.lines().find(|line| line.starts_with(&format!("| `{party}/` |")));
            let named = line.is_some_and(|line| line.contains(&format!("`{state}`")));
            assert!(named, "{} is not in ARCHITECTURE.md", point.name());
        }
    }
}
