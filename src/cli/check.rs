//! `taffrail check`: reads a configuration and says what it means, without starting anything.

use std::path::PathBuf;

use super::CliResult;
use crate::config::Config;
use crate::config::memory::{Facts, Plan};
use crate::memory::budget::Part;
use crate::memory::process;

/// Check a configuration file and show where its lcores would run and what its memory is for
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
    let mempools = show_plan(&config)?;
    #[cfg(not(feature = "dpdk"))]
    let mempools = 0;
    show_memory(&config, mempools)
}

/// What each part of the process may take.
fn show_memory(config: &Config, mempools: u64) -> CliResult {
    let facts = Facts {
        available: process::available(),
        mempools,
        // The store may have more than the configuration; the server counts them when it starts.
        partitions: 0,
    };
    let plan = Plan::new(config, &facts)?;
    let iec = |bytes| bytesize::ByteSize(bytes).display().iec().to_string();
    let from = match plan.configured {
        true => "as configured".to_owned(),
        false => format!("worked out: the process may have {}", iec(facts.available)),
    };
    println!("memory: {} ({from})", iec(plan.total));
    for part in Part::ALL {
        if plan.limit(part) > 0 {
            println!(
                "  {:18} {:>10}, at least {:>10}; at its limit {}",
                part.name(),
                iec(plan.limit(part)),
                iec(plan.minimum(part)),
                part.at_limit()
            );
        }
    }
    let (limits, minima) = Part::ALL.iter().fold((0, 0), |(limits, minima), &part| {
        (limits + plan.limit(part), minima + plan.minimum(part))
    });
    println!(
        "  {:18} {:>10}, at least {:>10}",
        "sum",
        iec(limits),
        iec(minima)
    );
    Ok(())
}

#[cfg(feature = "dpdk")]
fn show_plan(config: &Config) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
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
    for (_, port) in config.kernel_ports() {
        let addresses = port.addresses.iter().map(|a| a.address.to_string());
        let addresses: Vec<String> = addresses.collect();
        println!(
            "port {}: kernel sockets at {}",
            port.name,
            addresses.join(", ")
        );
    }
    for note in &plan.notes {
        println!("note: {note}");
    }
    Ok(crate::serve::packet_memory(config, &plan))
}
