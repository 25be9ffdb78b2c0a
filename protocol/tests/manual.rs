//! Checks docs/troubleshooting.md against the programs: its tables cover every refusal and every reason for a roll-back,
//! and contain nothing that the programs do not say.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The crates whose messages the manual explains.
const CRATES: [&str; 5] = ["backend", "channel", "control", "protocol", "vmm"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn manual() -> String {
    fs::read_to_string(repository().join("docs/troubleshooting.md")).unwrap()
}

/// Returns the texts in backquotes in the first cells of every table with this heading.
fn table(manual: &str, heading: &str) -> Vec<String> {
    let mut texts = Vec::new();
    for table in manual.split(heading).skip(1) {
        // The rest of the heading and the rule below it are no rows.
        let rows = table.lines().skip(2).take_while(|line| line.starts_with("| "));
        let cells = rows.map(|row| row.trim_start_matches("| ").split(" | ").next().unwrap());
        texts.extend(cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned));
    }
    assert!(texts.len() > 10, "{heading} {texts:?}");
    texts
}

/// Returns what stands between `begin` and the next `"`, in each line of a source file of this crate.
fn quoted(file: &str, begin: &str) -> BTreeSet<String> {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file)).unwrap();
    let found =
        source.lines().filter_map(|line| Some(line.split_once(begin)?.1.split_once('"')?.0.to_owned()));
    found.collect()
}

/// Checks that a table has these texts, each once.
fn check_table(heading: &str, expected: &BTreeSet<String>) {
    let texts = table(&manual(), heading);
    let distinct: BTreeSet<_> = texts.iter().cloned().collect();
    let missing: Vec<_> = expected.difference(&distinct).collect();
    let unknown: Vec<_> = distinct.difference(expected).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "{heading}: missing {missing:?}, unknown {unknown:?}");
    assert_eq!(texts.len(), distinct.len(), "{heading} explains a text twice");
}

#[test]
fn manual_explains_every_refusal_and_no_other() {
    check_table("| refusal |", &quoted("handover/wire/refusal.rs", "=> \""));
    check_table("| reason |", &quoted("migration/refusal.rs", "=> \""));
}

#[test]
fn manual_explains_every_reason_for_a_roll_back_and_no_other() {
    let mut reasons = quoted("end_reason.rs", "#[error(\"");
    // A failure of the source, which has its own text.
    assert!(reasons.remove("{0}"));
    let reasons = reasons.iter().map(|reason| reason.replace("{0}", "…")).collect();
    check_table("| rolled back because |", &reasons);
}

/// Appends the Rust files below a directory, with literals that span lines joined.
fn read_sources(directory: &Path, sources: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_sources(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            for line in fs::read_to_string(&path).unwrap().replace("\\\"", "\"").lines() {
                let line = line.trim_start();
                match line.strip_suffix('\\') {
                    Some(continued) => sources.push_str(continued),
                    None => sources.extend([line, "\n"]),
                }
            }
        }
    }
}

#[test]
fn manual_explains_no_message_that_does_not_exist() {
    let mut sources = String::new();
    for name in CRATES {
        read_sources(&repository().join(name).join("src"), &mut sources);
    }
    // Values stand between the fragments.
    let exists = |text: &str| text.split('…').all(|fragment| sources.contains(fragment));
    let unknown: Vec<_> = table(&manual(), "| message |").into_iter().filter(|text| !exists(text)).collect();
    assert!(unknown.is_empty(), "no program says {unknown:#?}");
}
