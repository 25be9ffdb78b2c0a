//! Checks the properties and the state of another VMM's VM. A failed check reports all reasons, not just the first.

use std::collections::BTreeSet;

use super::facts::{MachineFacts, NetFacts};
use super::refusal::Refusal;
use super::state::{NetState, VmState};
use crate::reasons::Reasons;

/// The largest virtqueue (Virtio 1.2, section 2.7).
const MAX_QUEUE: u16 = 32768;
/// The most unread input of the serial port, in bytes.
const SERIAL_INPUT: usize = 64;
/// The most model-specific registers of a vCPU.
const MAX_MSRS: usize = 4096;
/// The most CPUID entries of a vCPU.
const MAX_CPUID: usize = 256;

/// Returns all reasons why the VM `source` cannot move to `target`.
pub fn judge(source: &MachineFacts, target: &MachineFacts) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if source.cpus != target.cpus {
        refusals.push(Refusal::Cpus { source_cpus: source.cpus, target: target.cpus });
    }
    if source.memory != target.memory {
        refusals.push(Refusal::Memory { source_bytes: source.memory, target: target.memory });
    }
    for (facts, side) in [(source, "source"), (target, "target")] {
        if !facts.moves_tsc {
            refusals.push(Refusal::Tsc { side });
        }
    }
    if source.nested {
        refusals.push(Refusal::Nested);
    }
    if source.net.len() != target.net.len() {
        refusals.push(Refusal::Devices { source_devices: source.net.len(), target: target.net.len() });
    }
    for (device, (source, target)) in source.net.iter().zip(&target.net).enumerate() {
        judge_device(device, source, target, &mut refusals);
    }
    refusals
}

fn judge_device(device: usize, source: &NetFacts, target: &NetFacts, refusals: &mut Vec<Refusal>) {
    if source.queue_pairs != target.queue_pairs {
        refusals.push(Refusal::QueuePairs {
            device,
            source_pairs: source.queue_pairs,
            target: target.queue_pairs,
        });
    }
    if source.local != target.local {
        refusals.push(Refusal::LocalMigration { device, source_local: source.local });
    }
    for (facts, side) in [(source, "source"), (target, "target")] {
        if !facts.connected {
            refusals.push(Refusal::Backend { device, side });
        } else if source.local && target.local && !facts.device_state {
            refusals.push(Refusal::DeviceState { device, side });
        }
    }
    let missing = source.features & !target.features;
    if missing != 0 && target.connected {
        refusals.push(Refusal::Features { device, missing });
    }
    if target.mac.is_some() && source.mac != target.mac {
        refusals.push(Refusal::Mac { device });
    }
}

/// A VM state that matches a machine and is consistent in itself. Checks that need KVM or guest memory are still to
/// come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedState(VmState);

impl CheckedState {
    /// Checks a state against the machine's `facts`.
    ///
    /// # Errors
    /// Returns all reasons why the state is invalid.
    pub fn new(state: VmState, facts: &MachineFacts) -> Result<Self, Reasons> {
        let mut refusals = Vec::new();
        let mut refuse = |text: String| refusals.push(Refusal::State(text));
        if state.vcpus.len() != usize::from(facts.cpus) {
            refuse(format!("{} vCPUs instead of {}", state.vcpus.len(), facts.cpus));
        }
        for (id, vcpu) in state.vcpus.iter().enumerate() {
            if vcpu.msrs.len() > MAX_MSRS || vcpu.cpuid.len() > MAX_CPUID {
                refuse(format!("vCPU {id} has too many MSRs or CPUID entries"));
            }
        }
        if state.serial.input.len() > SERIAL_INPUT {
            refuse("more serial input than the port can hold".to_owned());
        }
        if state.net.len() != facts.net.len() {
            refuse(format!("{} network devices instead of {}", state.net.len(), facts.net.len()));
        }
        for (device, (state, facts)) in state.net.iter().zip(&facts.net).enumerate() {
            if let Err(text) = check_device(state, facts) {
                refuse(format!("network device {device}: {text}"));
            }
        }
        Reasons::none_of(refusals)?;
        Ok(Self(state))
    }
}

impl std::ops::Deref for CheckedState {
    type Target = VmState;

    fn deref(&self) -> &VmState {
        &self.0
    }
}

fn check_device(state: &NetState, facts: &NetFacts) -> Result<(), String> {
    let pairs = facts.queue_pairs;
    if state.identity.queue_pairs != pairs {
        return Err(format!("{} queue pairs instead of {pairs}", state.identity.queue_pairs));
    }
    let queues = &state.transport.queues;
    if queues.len() != usize::from(pairs) * 2 + 1 {
        return Err(format!("{} virtqueues for {pairs} queue pairs", queues.len()));
    }
    if let Some(queue) = queues.iter().find(|queue| queue.ready && !is_size(queue.size)) {
        return Err(format!("invalid virtqueue size {}", queue.size));
    }
    if state.transport.driver_features & !state.identity.features != 0 && state.driver.is_some() {
        return Err("the driver acknowledged features that were not offered".to_owned());
    }
    let Some(driver) = &state.driver else { return Ok(()) };
    if !(1..=pairs).contains(&driver.active_queue_pairs) {
        return Err(format!("{} active queue pairs, not 1 to {pairs}", driver.active_queue_pairs));
    }
    let mut seen = BTreeSet::new();
    for base in &driver.bases {
        if base.index >= pairs * 2 || !seen.insert(base.index) {
            return Err(format!("invalid or duplicate base of virtqueue {}", base.index));
        }
    }
    Ok(())
}

fn is_size(size: u16) -> bool {
    size.is_power_of_two() && size <= MAX_QUEUE
}
