//! The shipped programs contain no fault points. The programs that have them check `BATON_FAULT` when they start.

use std::process::Command;

use anyhow::{Result, ensure};
use baton_tests::faults::{Action, Faults, Point};
use baton_tests::programs;

#[test]
fn shipped_programs_contain_no_fault_points() -> Result<()> {
    let traces = ["BATON_FAULT", "BATON_HURRY", "fault point"].into_iter();
    let traces: Vec<_> = traces.chain(Point::ALL.iter().map(|point| point.name())).collect();
    for (shipped, faulty) in
        [(programs::backend()?, programs::faulty_backend()?), (programs::vmm()?, programs::faulty_vmm()?)]
    {
        let (shipped, faulty) = (std::fs::read(shipped)?, std::fs::read(faulty)?);
        let (shipped, faulty) = (String::from_utf8_lossy(&shipped), String::from_utf8_lossy(&faulty));
        for trace in &traces {
            ensure!(!shipped.contains(trace), "{trace:?} is in the shipped program");
            ensure!(faulty.contains(trace), "{trace:?} is not in the program with fault points");
        }
    }
    Ok(())
}

#[test]
fn unknown_fault_point_is_an_error_at_start() -> Result<()> {
    for (program, name) in
        [(programs::faulty_backend()?, "baton-backend-faulty"), (programs::faulty_vmm()?, "baton-vmm-faulty")]
    {
        let run = |faults: &str| Command::new(&program).arg("--help").env("BATON_FAULT", faults).output();
        let output = run("source-vmm/lost:kill")?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(2), "{:?}", output.status);
        ensure!(stderr.starts_with(&format!("{name}: ")) && stderr.contains("source-vmm/lost"), "{stderr}");
        for (variable, value) in Faults::at(Point::TargetVmmRestored, Action::Fail).environment() {
            ensure!(variable != "BATON_FAULT" || run(&value)?.status.success(), "{value}");
        }
    }
    Ok(())
}
