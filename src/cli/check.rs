//! `taffrail check`: reads a configuration and says what it means, without starting anything.

use std::path::PathBuf;

use super::CliResult;
use crate::config::Config;

/// Check a configuration file and show where its lcores would run
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "taffrail.toml")]
    config: PathBuf,
}

/// Prints the plan, or the first error with its line.
pub fn run(args: &Args) -> CliResult {
    let config = Config::load(&args.config)?;
    println!(
        "{}: {} ports, {} topics, {} UDP sources, {} shards in {}",
        args.config.display(),
        config.ports.len(),
        config.topics.len(),
        config.udp.len(),
        config.storage.shards,
        config.storage.path.display()
    );
    #[cfg(feature = "dpdk")]
    show_plan(&config)?;
    Ok(())
}

#[cfg(feature = "dpdk")]
fn show_plan(config: &Config) -> CliResult {
    let machine = crate::topology::Machine::discover()?;
    let plan = crate::topology::plan(config, &machine)?;
    for (index, lcore) in plan.lcores.iter().enumerate() {
        let node = lcore
            .node
            .map_or_else(|| "unknown".to_owned(), |node| node.to_string());
        let queues: Vec<String> = lcore
            .queues
            .iter()
            .map(|&(port, queue)| format!("{}:{queue}", config.ports[port].name))
            .collect();
        let shards: Vec<String> = lcore.shards.iter().map(u16::to_string).collect();
        println!(
            "lcore {} on CPU {} (node {node}): queues [{}] shards [{}]",
            index + 1,
            lcore.cpu,
            queues.join(" "),
            shards.join(" ")
        );
    }
    for note in &plan.notes {
        println!("note: {note}");
    }
    Ok(())
}
