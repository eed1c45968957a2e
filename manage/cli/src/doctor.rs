//! `bedplate doctor`: what this host can give VMs.

use std::process::ExitCode;
use vmm::doctor::{Finding, examine};

/// Prints it.
pub fn doctor(json: bool) -> anyhow::Result<ExitCode> {
    let findings = examine();
    match json {
        true => println!("{}", serde_json::to_string(&findings)?),
        false => print!("{}", table(&findings)),
    }
    Ok(ExitCode::SUCCESS)
}

fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.what.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Finding { what, good, detail, way_out } in findings {
        let mark = if *good { "yes" } else { "no " };
        text.push_str(&format!("{mark}  {what:width$}  {detail}\n"));
        if let Some(way_out) = way_out {
            text.push_str(&format!("     {:width$}  -> {way_out}\n", ""));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_its_way_out() {
        let finding = |what, good, way_out| Finding { what, good, detail: "detail".into(), way_out };
        let text = table(&[finding("kvm", true, None), finding("memory", false, Some("buy some"))]);
        assert_eq!(text, "yes  kvm     detail\nno   memory  detail\n             -> buy some\n");
    }
}
