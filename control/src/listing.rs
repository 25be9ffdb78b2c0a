//! Formats a reply for people: aligned names and values, and a table for each list.

use std::fmt::Write;

use serde_json::{Map, Value};

/// Formats the fields of a reply: first the plain ones, one per line, then each list as a table with a row for each
/// item. An item that consists of objects has a row for each of them. Every line ends in a newline.
pub fn listing(reply: &Value) -> String {
    let Value::Object(fields) = reply else { return format!("{}\n", scalar(reply)) };
    let (lists, plain): (Vec<_>, Vec<_>) = fields.iter().partition(|(_, value)| is_list_of_objects(value));

    let rows = plain.into_iter().flat_map(|(name, value)| match value {
        Value::Object(fields) => {
            fields.iter().map(|(field, value)| vec![format!("{name} {field}:"), scalar(value)]).collect()
        }
        value => vec![vec![format!("{name}:"), scalar(value)]],
    });
    let rows = rows.collect();
    let mut text = aligned(rows, Alignment::Left);
    for (name, list) in lists {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n{name}:\n{}", table(list.as_array().map_or(&[], Vec::as_slice)));
    }
    text
}

fn is_list_of_objects(value: &Value) -> bool {
    matches!(value, Value::Array(items) if items.iter().all(Value::is_object))
}

/// Formats a value for one cell.
fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        other => other.to_string(),
    }
}

/// Formats a list as a table: a header row, then the numbered rows of each item.
fn table(items: &[Value]) -> String {
    let mut rows: Vec<(String, &Map<String, Value>)> = Vec::new();
    for (number, item) in items.iter().enumerate() {
        let Value::Object(fields) = item else { continue };
        if fields.values().any(|value| !value.is_object()) {
            rows.push((number.to_string(), fields));
        }
        for (name, value) in fields {
            if let Value::Object(inner) = value {
                rows.push((format!("{number} {name}"), inner));
            }
        }
    }

    let mut columns: Vec<&str> = Vec::new();
    for (_, fields) in &rows {
        for (name, value) in *fields {
            if !value.is_object() && !columns.contains(&name.as_str()) {
                columns.push(name);
            }
        }
    }

    let mut cells =
        vec![std::iter::once(String::new()).chain(columns.iter().map(|&name| name.to_owned())).collect()];
    for (label, fields) in rows {
        let values = columns.iter().map(|&name| fields.get(name).map_or_else(String::new, scalar));
        cells.push(std::iter::once(label).chain(values).collect());
    }
    aligned(cells, Alignment::Right)
}

/// The alignment of all columns but the first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alignment {
    Left,
    Right,
}

/// Pads every column to its widest cell. The first column is aligned left.
fn aligned(rows: Vec<Vec<String>>, alignment: Alignment) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in &rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            // Writing to a string cannot fail.
            let _ = if column == 0 || alignment == Alignment::Left {
                write!(line, "{gap}{cell:<width$}")
            } else {
                write!(line, "{gap}{cell:>width$}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use baton_protocol::control::{
        BackendState, BackendStats, BackendStatus, Datapath, DirectionStats, Done, Frontend, HandoverState,
        HandoverStatus, QueuePairStats, VringStatus,
    };

    use super::*;

    #[test]
    fn a_status_lists_its_vrings_in_a_table() {
        let status = BackendStatus {
            state: BackendState::Serving,
            tap: "tap0".to_owned(),
            queue_pairs: 1,
            features: "0x130000000".to_owned(),
            protocol_features: "0x1".to_owned(),
            frontend: Frontend::Connected,
            datapath: Datapath::Userspace,
            vrings: vec![
                VringStatus { started: true, enabled: true, size: 256 },
                VringStatus { started: false, enabled: true, size: 1024 },
            ],
            handover: Some(HandoverStatus {
                state: HandoverState::Armed,
                peer: "/run/next".to_owned(),
                epoch: Some(0),
                reason: None,
            }),
        };
        let expected = "\
state:              serving
tap:                tap0
queue_pairs:        1
features:           0x130000000
protocol_features:  0x1
frontend:           connected
datapath:           userspace
handover state:     armed
handover peer:      /run/next
handover epoch:     0

vrings:
   started  enabled  size
0      yes      yes   256
1       no      yes  1024
";
        assert_eq!(listing(&serde_json::to_value(status).unwrap()), expected);
    }

    #[test]
    fn statistics_have_a_row_for_each_direction() {
        let none = DirectionStats {
            frames: Some(0),
            bytes: Some(0),
            large_frames: Some(0),
            largest_frame: Some(0),
            dropped: Some(0),
            discarded: 0,
            kicks: Some(0),
            calls: Some(0),
        };
        let rx = DirectionStats { frames: Some(12345), bytes: Some(7), ..none };
        let stats = BackendStats { queue_pairs: vec![QueuePairStats { rx, tx: none }] };
        let expected = "
queue_pairs:
      frames  bytes  large_frames  largest_frame  dropped  discarded  kicks  calls
0 rx   12345      7             0              0        0          0      0      0
0 tx       0      0             0              0        0          0      0      0
";
        assert_eq!(listing(&serde_json::to_value(stats).unwrap()), expected);
    }

    #[test]
    fn absent_statistics_have_no_column() {
        let tx = DirectionStats { discarded: 7, ..DirectionStats::default() };
        let stats = BackendStats { queue_pairs: vec![QueuePairStats { rx: DirectionStats::default(), tx }] };
        let expected = "
queue_pairs:
      discarded
0 rx          0
0 tx          7
";
        assert_eq!(listing(&serde_json::to_value(stats).unwrap()), expected);
    }

    #[test]
    fn a_plain_reply_is_one_line() {
        assert_eq!(listing(&serde_json::to_value(Done::DONE).unwrap()), "result:  done\n");
    }
}
