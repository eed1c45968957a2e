//! What Bedplate is held to beside QEMU TCG: how many times faster, by class of workloads and for its least row.

use std::collections::BTreeMap;

use super::{geomean, times};

/// For some rows: what their geometric mean and the least of them have to reach.
struct Goal {
    /// A class, or a workload that has a goal of its own.
    of: &'static str,
    mean: f64,
    least: f64,
}

const fn goal(of: &'static str, mean: f64, least: f64) -> Goal {
    Goal { of, mean, least }
}

/// What every row reaches that no other goal names.
const ANY_ROW: f64 = 1.2;

/// A row counts for its own goal, or else for its class.
const GOALS: &[Goal] = &[
    goal("integer", 3.5, 2.2),
    goal("application", 3.0, 1.3),
    goal("float", 12.0, ANY_ROW),
    goal("x87", 18.0, ANY_ROW),
    goal("sse2", 12.0, ANY_ROW),
    goal("aes-sha", 25.0, ANY_ROW),
    goal("avx2", 100.0, ANY_ROW),
    goal("memcpy-1M", 50.0, 50.0),
    goal("rep-movsb-64K", 50.0, 50.0),
    goal("rep-stosq-64K", 50.0, 50.0),
    goal("getppid", 2.5, 2.5),
    goal("open-close", 5.0, 5.0),
    goal("read-4K", 10.0, 10.0),
    goal("access", 10.0, 10.0),
    goal("process", 5.0, 3.0),
];

/// Rows without a goal: bound by DRAM or the divider, atomics that TCG leaves out with one processor, fork.
const NO_GOAL: &[&str] = &["chase-16M", "divisions", "atomics-2", "fork-exit"];

/// Most that all rows may take against the host, by their geometric mean.
const SLOWDOWN: f64 = 2.2;

/// A measured row.
pub struct Measured<'a> {
    pub class: &'a str,
    pub name: &'a str,
    /// How many times faster than TCG.
    pub faster: Option<f64>,
    /// How many times slower than the host.
    pub slower: Option<f64>,
}

/// A Markdown table of goals and what was reached. Goals without a measured row are left out.
pub fn table(rows: &[Measured<'_>]) -> String {
    let mut by_goal: BTreeMap<usize, Vec<&Measured<'_>>> = BTreeMap::new();
    for row in rows.iter().filter(|row| !NO_GOAL.contains(&row.name)) {
        by_goal.entry(index(row)).or_default().push(row);
    }
    let mut table =
        "| goal | faster than TCG | wanted | least row | wanted | |\n|---|---:|---:|---|---:|---|\n"
            .to_string();
    for (index, rows) in by_goal {
        let other = goal("any other", 0.0, ANY_ROW);
        let goal = GOALS.get(index).unwrap_or(&other);
        let ratios = || rows.iter().filter_map(|row| Some((row.faster?, row.name)));
        let Some((least, name)) = ratios().min_by(|a, b| a.0.total_cmp(&b.0)) else { continue };
        let mean = geomean(ratios().map(|(ratio, _)| ratio));
        let met = mean.is_some_and(|mean| mean >= goal.mean) && least >= goal.least;
        let wanted = if goal.mean > 0.0 { times(Some(goal.mean)) } else { "–".into() };
        table.push_str(&format!(
            "| {} | {} | {wanted} | {name} {} | {} | {} |\n",
            goal.of,
            times(mean),
            times(Some(least)),
            times(Some(goal.least)),
            if met { "met" } else { "**missed**" },
        ));
    }
    if let Some(slowdown) = geomean(rows.iter().filter_map(|row| row.slower)) {
        let met = if slowdown <= SLOWDOWN { "met" } else { "**missed**" };
        table.push_str(&format!(
            "\nAll rows are {slowdown:.2}× slower than the host; at most {SLOWDOWN}×: {met}\n"
        ));
    }
    table
}

/// Which goal a row counts for; behind the last: none of them.
fn index(row: &Measured<'_>) -> usize {
    let of = |what: &str| GOALS.iter().position(|goal| goal.of == what);
    of(row.name).or_else(|| of(row.class)).unwrap_or(GOALS.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row<'a>(class: &'a str, name: &'a str, faster: f64) -> Measured<'a> {
        Measured { class, name, faster: Some(faster), slower: Some(2.0) }
    }

    #[test]
    fn rows_count_for_their_own_goal_or_their_class() {
        let rows = [
            row("integer", "sha256", 7.0),
            row("integer", "qsort", 2.3),
            row("integer", "divisions", 0.5),
            row("memory", "memcpy-1M", 49.0),
            row("code", "patch", 1.1),
        ];
        let table = table(&rows);
        assert!(table.contains("| integer | 4.01× | 3.50× | qsort 2.30× | 2.20× | met |"), "{table}");
        assert!(table.contains("| memcpy-1M | 49× | 50× | memcpy-1M 49× | 50× | **missed** |"), "{table}");
        assert!(table.contains("| any other | 1.10× | – | patch 1.10× | 1.20× | **missed** |"), "{table}");
        assert!(table.contains("2.00× slower than the host; at most 2.2×: met"), "{table}");
    }
}
