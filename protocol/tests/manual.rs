//! The operator's manual says of every refusal what to do.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::path::Path;

/// The names in a module of refusals, as its `name` function has them.
fn names(module: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(module).join("refusal.rs");
    let source = std::fs::read_to_string(path).unwrap();
    let name = |line: &str| Some(line.split_once("=> \"")?.1.split_once('"')?.0.to_owned());
    source.lines().filter_map(name).collect()
}

#[test]
fn every_refusal_is_in_the_manual() {
    let manual = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    // A table of each kind: its rows begin with the names.
    for (module, heading) in [("handover/wire", "| refusal |"), ("migration", "| reason |")] {
        let table = manual.split_once(heading).unwrap().1;
        let rows: Vec<_> = table.lines().take_while(|line| !line.is_empty()).collect();
        let named = |name: &str| {
            rows.iter().any(|row| row.split(" | ").next().unwrap().contains(&format!("`{name}`")))
        };
        let names = names(module);
        assert!(names.len() > 10, "{names:?}");
        let missing: Vec<_> = names.iter().filter(|name| !named(name)).collect();
        assert!(missing.is_empty(), "the manual says nothing of {missing:?}");
    }
}
