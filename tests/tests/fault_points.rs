//! What is shipped has no fault points; the programs that have them do what they are told.

use std::process::Command;

use anyhow::{Result, ensure};
use baton_tests::faults::{Action, Faults, Point};
use baton_tests::programs;

#[test]
fn what_is_shipped_has_no_trace_of_fault_points() -> Result<()> {
    let traces = ["BATON_FAULT", "BATON_HURRY", "fault point"].into_iter();
    let traces: Vec<_> = traces.chain(Point::ALL.iter().map(|point| point.name())).collect();
    for (shipped, faulty) in
        [(programs::backend()?, programs::faulty_backend()?), (programs::vmm()?, programs::faulty_vmm()?)]
    {
        let (shipped, faulty) = (std::fs::read(shipped)?, std::fs::read(faulty)?);
        let (shipped, faulty) = (String::from_utf8_lossy(&shipped), String::from_utf8_lossy(&faulty));
        for trace in &traces {
            ensure!(!shipped.contains(trace), "{trace:?} is in what is shipped");
            ensure!(faulty.contains(trace), "{trace:?} is not in what has fault points");
        }
    }
    Ok(())
}

#[test]
fn an_order_that_makes_no_sense_is_an_error_at_the_start() -> Result<()> {
    for (program, name) in
        [(programs::faulty_backend()?, "baton-backend-faulty"), (programs::faulty_vmm()?, "baton-vmm-faulty")]
    {
        let run = |faults: &str| Command::new(&program).arg("--help").env("BATON_FAULT", faults).output();
        let output = run("source-vmm/lost:kill")?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(2), "{:?}", output.status);
        ensure!(said.starts_with(&format!("{name}: ")) && said.contains("source-vmm/lost"), "{said}");
        for (variable, value) in Faults::at(Point::TargetVmmRestored, Action::Fail).environment() {
            ensure!(variable != "BATON_FAULT" || run(&value)?.status.success(), "{value}");
        }
    }
    Ok(())
}
