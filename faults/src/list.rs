//! The list of all fault points.

/// The process that has a fault point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// The VMM that a VM migrates from.
    SourceVmm,
    /// The VMM that a VM migrates to.
    TargetVmm,
    /// The back-end that hands over a device.
    SourceBackend,
    /// The back-end that takes over a device.
    TargetBackend,
    /// The back-end that hands over a running session.
    SourceSession,
    /// The back-end that takes over a running session.
    TargetSession,
}

/// The kind of batch that a worker is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// Received frames are in guest memory, but not published as used.
    Received,
    /// Frames have been sent to the network, but their chains are not published as used.
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
            /// All fault points, in the order in which a process reaches them.
            pub const ALL: &[Self] = &[$($(Self::$point,)*)*];

            /// Returns its name in `BATON_FAULT`.
            pub fn name(self) -> &'static str {
                match self {
                    $($(Self::$point => concat!($prefix, "/", $name),)*)*
                }
            }

            /// Returns the process that reaches it.
            pub fn party(self) -> Party {
                match self {
                    $($(Self::$point => Party::$party,)*)*
                }
            }

            /// Returns whether an error can be returned there.
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
        /// The source has connected to the target, and no message was sent.
        SourceVmmConnected = "connected", fails;
        /// The target would accept the VM.
        SourceVmmGreeted = "greeted", fails;
        /// The target is prepared, and the VM runs.
        SourceVmmPrepared = "prepared", fails;
        /// The vCPUs are stopped.
        SourceVmmVcpusStopped = "vcpus-stopped", fails;
        /// The rings are stopped as well.
        SourceVmmRingsStopped = "rings-stopped", fails;
        /// The back-ends have offered the TAPs that move along.
        SourceVmmDevicesOffered = "devices-offered", fails;
        /// The source has saved the state of the VM, but not sent it.
        SourceVmmSaved = "saved", fails;
        /// The source has sent the state.
        SourceVmmStateSent = "state-sent", fails;
        /// The target has received everything, and nothing is committed.
        SourceVmmReady = "ready", fails;
        /// The source has swapped the ownership word to offered, which is the commit point, but not sent COMMIT.
        SourceVmmOffered = "offered", fails;
        /// The source has sent COMMIT.
        SourceVmmCommitSent = "commit-sent";
        /// The source knows that the target owns the VM.
        SourceVmmCompleted = "completed";
    }
    TargetVmm "target-vmm" {
        /// A source has connected.
        TargetVmmConnected = "connected", fails;
        /// The target would accept the VM, but has not told the source.
        TargetVmmGreeted = "greeted", fails;
        /// The target has shared guest memory with KVM and the back-ends, but not told the source.
        TargetVmmPrepared = "prepared", fails;
        /// The target has received the state of the VM.
        TargetVmmStateReceived = "state-received", fails;
        /// The back-ends have adopted the TAPs that moved along.
        TargetVmmDevicesAdopted = "devices-adopted", fails;
        /// The target has restored everything, but not told the source.
        TargetVmmRestored = "restored", fails;
        /// The target has received COMMIT, but not taken the ownership word.
        TargetVmmCommitting = "committing", fails;
        /// The target owns the VM, which is still stopped.
        TargetVmmTaken = "taken";
        /// The VM runs, but the target has not told the source.
        TargetVmmResumed = "resumed";
    }
    SourceBackend "source-backend" {
        /// The front-end has requested the state of the device.
        SourceBackendSaving = "saving", fails;
        /// The source has stopped using the TAP, but the ownership word still says source.
        SourceBackendTapAside = "tap-aside";
        /// The source has swapped the ownership word to offered, but sent nothing.
        SourceBackendOffered = "offered", fails;
        /// The source has sent the offer, but not told the front-end.
        SourceBackendOfferSent = "offer-sent";
        /// The target has adopted the TAP.
        SourceBackendAdopted = "adopted";
        /// The target owns the TAP, which the source still has open.
        SourceBackendHandedOver = "handed-over";
    }
    TargetBackend "target-backend" {
        /// The front-end is about to send the state of the device.
        TargetBackendLoading = "loading", fails;
        /// The target has received the offer, but not checked it.
        TargetBackendOfferReceived = "offer-received", fails;
        /// The target has adopted the TAP without changing it, and not told the source or the front-end.
        TargetBackendAdopted = "adopted";
        /// The front-end has started a ring, but the target has not taken the ownership word.
        TargetBackendTaking = "taking";
        /// The target owns the TAP, but does not use it yet.
        TargetBackendTaken = "taken";
        /// The target uses the TAP, but has not told the source.
        TargetBackendActive = "active";
    }
    SourceSession "source-session" {
        /// The source has connected to the target, and received nothing.
        SourceSessionConnected = "connected", fails;
        /// The target has answered HELLO, and the source has not described the session.
        SourceSessionGreeted = "greeted";
        /// The target would accept the session. Nothing is staged, and the source no longer hears the front-end.
        SourceSessionReady = "ready", fails;
        /// The source has sent STAGE, with only the first packet of descriptors.
        SourceSessionStageSent = "stage-sent";
        /// The target has staged everything, and the rings still run.
        SourceSessionStaged = "staged";
        /// The source has stopped the rings, but the ownership word still says source.
        SourceSessionFrozen = "frozen", fails;
        /// The source has swapped the ownership word to offered, but not sent COMMIT.
        SourceSessionOffered = "offered";
        /// The source has sent COMMIT.
        SourceSessionCommitSent = "commit-sent";
        /// The source knows that the target owns the session, but still has it open.
        SourceSessionHandedOver = "handed-over";
        /// The source has closed the session, but not replied to the operator.
        SourceSessionReleased = "released";
    }
    TargetSession "target-session" {
        /// The target has received HELLO, but not checked it.
        TargetSessionArrived = "arrived", fails;
        /// The target would accept the session, but has not told the source.
        TargetSessionJudged = "judged";
        /// The target has received STAGE, and more descriptors follow.
        TargetSessionGathering = "gathering";
        /// The target has received all descriptors, but not used them.
        TargetSessionGathered = "gathered", fails;
        /// The target has staged everything without changing it, and not told the source.
        TargetSessionStaged = "staged";
        /// The target has told the source that everything is staged.
        TargetSessionStagedSent = "staged-sent";
        /// The target is about to take the ownership word.
        TargetSessionTaking = "taking";
        /// The target owns the session, but no ring runs.
        TargetSessionTaken = "taken";
        /// The rings run, but the target has not told the source.
        TargetSessionRunning = "running";
        /// The target has told the source, but not settled the ownership word.
        TargetSessionActiveSent = "active-sent";
        /// The target has settled the ownership word, but not yet read from the front-end's socket.
        TargetSessionSettled = "settled";
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_name_is_unique_and_in_the_architecture_document() {
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
