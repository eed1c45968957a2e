//! A few cases of every form, from a fixed seed.

use differential::campaign::{Options, run};

#[test]
fn the_interpreter_does_what_the_host_does() {
    let options = Options { cases: 8, seed: 1, filter: String::new(), describe: 1 };
    let report = run(&options).expect("the native side starts");
    println!("seed {}: {} forms, {} cases", options.seed, report.forms, report.cases);
    let lines: Vec<_> = report.failures.values().flat_map(|(_, texts)| texts).collect();
    assert!(report.coverage() >= 0.95, "only {:.3} of the forms are covered", report.coverage());
    assert!(lines.is_empty(), "seed {}: {} forms fail:\n{lines:#?}", options.seed, lines.len());
}
