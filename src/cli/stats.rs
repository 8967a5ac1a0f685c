//! `taffrail stats`: the running server's accounts as tables, or as JSON.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use comfy_table::Table;

use super::{CliResult, ServerArgs};
use crate::control::client::ControlClient;
use crate::control::protocol::{AccountStats, MemoryStats, PortStats, Reasons, Stats, total};

/// Show what the running server received, stored and lost, and why
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Print the counters as JSON
    #[arg(long)]
    json: bool,
    /// Print again every second, with rates, until interrupted
    #[arg(long)]
    watch: bool,
    /// With --watch: seconds between two prints
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 1.0,
        requires = "watch"
    )]
    interval: f64,
    /// With --watch: stop after this many prints
    #[arg(long, value_name = "N", requires = "watch")]
    count: Option<u64>,
}

/// Prints the tables; an account that does not add up is named below them.
pub fn run(args: &Args) -> CliResult {
    let interval = Duration::try_from_secs_f64(args.interval.max(0.05))?;
    let mut client = ControlClient::connect(&args.server.socket_path()?)?;
    let mut before: Option<Stats> = None;
    let mut printed = 0;
    loop {
        let stats = client.stats()?;
        let mut out = std::io::stdout().lock();
        if args.json {
            serde_json::to_writer(&mut out, &stats)?;
            writeln!(out)?;
        } else {
            if args.watch && out.is_terminal() {
                // Clear the screen and begin at its top (ECMA-48).
                write!(out, "\x1b[2J\x1b[H")?;
            }
            out.write_all(tables(&stats, before.as_ref()).as_bytes())?;
        }
        out.flush()?;
        drop(out);
        printed += 1;
        if !args.watch || args.count.is_some_and(|count| printed >= count) {
            return Ok(());
        }
        before = Some(stats);
        std::thread::sleep(interval);
    }
}

/// All tables as text; with an earlier snapshot, also rates between the two.
fn tables(stats: &Stats, before: Option<&Stats>) -> String {
    let seconds = before.map(|b| (stats.unix_ms - b.unix_ms).max(1) as f64 / 1000.0);
    let rate = |now: u64, then: Option<u64>| match (seconds, then) {
        (Some(seconds), Some(then)) => format!("{:.0}", now.saturating_sub(then) as f64 / seconds),
        _ => "-".to_owned(),
    };
    let mut text = format!(
        "Taffrail {}, up {}\n",
        stats.version,
        humantime::format_duration(Duration::from_secs(stats.uptime_ms / 1000))
    );

    text += "\nPackets by port: received = handled + delivered + dropped\n";
    let mut table = table(&[
        "port",
        "link",
        "received",
        "/s",
        "handled",
        "delivered",
        "dropped",
        "sent",
        "lost before rx",
    ]);
    for (i, port) in stats.ports.iter().enumerate() {
        let then = before.and_then(|b| b.ports.get(i)).map(|p| p.received);
        table.add_row([
            port.name.clone(),
            port.link.clone(),
            received(port),
            rate(port.received, then),
            reasons(&port.handled),
            port.delivered.to_string(),
            reasons(&port.dropped),
            if port.send_dropped > 0 {
                format!("{} ({} not taken)", port.sent, port.send_dropped)
            } else {
                port.sent.to_string()
            },
            reasons(&port.nic),
        ]);
    }
    text += &rendered(&table);

    text += "\nMessages by topic: received = stored + duplicate + refused + dropped + in flight\n";
    let mut table = self::table(&[
        "topic",
        "received",
        "stored",
        "/s",
        "duplicate",
        "refused",
        "dropped",
        "in flight",
        "bytes",
    ]);
    for topic in &stats.topics {
        let then = before
            .and_then(|b| b.topics.iter().find(|t| t.name == topic.name))
            .map(|t| t.stored);
        table.add_row([
            topic.name.clone(),
            topic.received.to_string(),
            topic.stored.to_string(),
            rate(topic.stored, then),
            topic.duplicate.to_string(),
            reasons(&topic.refused),
            reasons(&topic.dropped),
            topic.in_flight.to_string(),
            bytesize::ByteSize(topic.stored_bytes)
                .display()
                .iec()
                .to_string(),
        ]);
    }
    text += &rendered(&table);

    text += "\nShards\n";
    let mut table = self::table(&[
        "shard",
        "state",
        "commits",
        "/s",
        "written",
        "segments",
        "SSTs",
        "in SSTs",
        "waiting acks",
        "credit",
        "queued",
        "producers",
    ]);
    for (i, shard) in stats.shards.iter().enumerate() {
        let then = before.and_then(|b| b.shards.get(i)).map(|s| s.commits);
        table.add_row([
            shard.shard.to_string(),
            shard.state.clone(),
            shard.commits.to_string(),
            rate(shard.commits, then),
            bytesize::ByteSize(shard.committed_bytes)
                .display()
                .iec()
                .to_string(),
            shard.segments.to_string(),
            shard.ssts.to_string(),
            bytesize::ByteSize(shard.sst_bytes)
                .display()
                .iec()
                .to_string(),
            shard.pending_acks.to_string(),
            shard.credit.to_string(),
            shard.queued.to_string(),
            shard.producers.to_string(),
        ]);
    }
    text += &rendered(&table);

    text += "\nSSTs, since the start\n";
    let mut table = self::table(&[
        "shard",
        "flushed",
        "into",
        "merges",
        "read",
        "written",
        "amplification",
        "expired",
        "compacted",
        "damaged",
        "merging now",
    ]);
    for shard in &stats.shards {
        let bytes = |n| bytesize::ByteSize(n).display().iec().to_string();
        let amplification = shard.write_amplification();
        table.add_row([
            shard.shard.to_string(),
            bytes(shard.flushed_bytes),
            bytes(shard.flush_written_bytes),
            shard.merges.to_string(),
            bytes(shard.merge_read_bytes),
            bytes(shard.merge_written_bytes),
            amplification.map_or("-".to_owned(), |factor| format!("{factor:.2}")),
            shard.records_expired.to_string(),
            shard.records_compacted.to_string(),
            shard.damaged_blocks.to_string(),
            match &shard.merging[..] {
                "" => "-".to_owned(),
                why => format!(
                    "{why}: {} of {}",
                    bytes(shard.merged_bytes),
                    bytes(shard.merging_bytes)
                ),
            },
        ]);
    }
    text += &rendered(&table);

    if let Some(kafka) = &stats.kafka {
        let then = before.and_then(|b| b.kafka.as_ref());
        let bytes = |n| bytesize::ByteSize(n).display().iec().to_string();
        text += "\nKafka clients, since the start\n";
        let mut table = self::table(&[
            "connections",
            "accepted",
            "refused",
            "closed",
            "requests",
            "/s",
            "batches",
            "refused",
            "produced",
            "fetched",
            "groups",
            "members",
        ]);
        table.add_row([
            kafka.connections.to_string(),
            kafka.accepted.to_string(),
            kafka.refused.to_string(),
            reasons(&kafka.closed),
            total(&kafka.requests).to_string(),
            rate(total(&kafka.requests), then.map(|t| total(&t.requests))),
            kafka.batches_in.to_string(),
            kafka.batches_refused.to_string(),
            bytes(kafka.bytes_in),
            bytes(kafka.bytes_out),
            kafka.groups.to_string(),
            kafka.members.to_string(),
        ]);
        text += &rendered(&table);
    }

    if let Some(memory) = &stats.memory {
        text += &self::memory(memory);
    }

    text += "\nPoll loops\n";
    let mut table = self::table(&[
        "lcore",
        "cpu",
        "role",
        "busy",
        "busy polls",
        "idle polls",
        "sleeps",
    ]);
    for (i, lcore) in stats.lcores.iter().enumerate() {
        let then = before.and_then(|b| b.lcores.get(i));
        let busy = lcore.busy_cycles - then.map_or(0, |t| t.busy_cycles.min(lcore.busy_cycles));
        let idle = lcore.idle_cycles - then.map_or(0, |t| t.idle_cycles.min(lcore.idle_cycles));
        table.add_row([
            lcore.lcore.to_string(),
            lcore.cpu.to_string(),
            lcore.role.clone(),
            format!("{:.1}%", 100.0 * busy as f64 / (busy + idle).max(1) as f64),
            lcore.busy_polls.to_string(),
            lcore.idle_polls.to_string(),
            lcore.sleeps.to_string(),
        ]);
    }
    text += &rendered(&table);

    let imbalances = stats.imbalances();
    if imbalances.is_empty() {
        text += "\nEvery account adds up.\n";
    }
    for imbalance in imbalances {
        text += &format!("\nDOES NOT ADD UP: {imbalance}\n");
    }
    text
}

/// What the process takes of memory, and for what.
fn memory(memory: &MemoryStats) -> String {
    let bytes = |n| bytesize::ByteSize(n).display().iec().to_string();
    let mut text = format!(
        "\nMemory: {} of a budget of {}; {} in ordinary pages, {} shared, {} huge; {} of mapped files beside it\n",
        bytes(memory.taken),
        bytes(memory.budget),
        bytes(memory.anonymous),
        bytes(memory.shared),
        bytes(memory.huge),
        bytes(memory.file)
    );
    let mut table = self::table(&["part", "at its limit", "limit", "used", "peak", "at limit"]);
    for account in &memory.accounts {
        table.add_row([
            account.name.clone(),
            account.at_limit.clone(),
            bytes(account.limit),
            bytes(account.used),
            bytes(account.peak),
            match account.over {
                0 => account.refused.to_string(),
                over => format!("{} ({over} over)", account.refused),
            },
        ]);
    }
    let sum = |of: fn(&AccountStats) -> u64| bytes(memory.accounts.iter().map(of).sum());
    table.add_row([
        "sum".to_owned(),
        match memory.heap {
            Some(heap) => format!("of the heap {} are allocated", bytes(heap)),
            None => String::new(),
        },
        sum(|account| account.limit),
        sum(|account| account.used),
        "-".to_owned(),
        "-".to_owned(),
    ]);
    text += &rendered(&table);
    text
}

/// The packets received, and below how many of them by each queue where there are several.
fn received(port: &PortStats) -> String {
    let mut text = port.received.to_string();
    if port.queues.len() > 1 {
        for (queue, count) in port.queues.iter().enumerate() {
            text += &format!("\nqueue {queue} {count}");
        }
    }
    text
}

/// `12 (fragment 2, unknown_port 10)`, or `0`.
fn reasons(reasons: &Reasons) -> String {
    if reasons.is_empty() {
        return "0".to_owned();
    }
    let parts: Vec<String> = reasons
        .iter()
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    format!("{}\n{}", total(reasons), parts.join("\n"))
}

/// The first two columns are words.
fn table(header: &[&str]) -> Table {
    super::table::table(header, 2)
}

fn rendered(table: &Table) -> String {
    format!("{table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{LcoreStats, ShardStats, TopicStats};

    #[test]
    fn tables_show_reasons_rates_and_imbalances() {
        let mut port = PortStats {
            name: "p0".into(),
            received: 30,
            delivered: 20,
            queues: vec![18, 12],
            ..Default::default()
        };
        port.dropped.insert("fragment".into(), 10);
        let before = Stats {
            unix_ms: 1000,
            ports: vec![PortStats {
                name: "p0".into(),
                ..Default::default()
            }],
            topics: vec![TopicStats {
                name: "ticks".into(),
                stored: 100,
                received: 100,
                ..Default::default()
            }],
            ..Default::default()
        };
        let mut now = Stats {
            unix_ms: 3000,
            ports: vec![port],
            topics: vec![TopicStats {
                name: "ticks".into(),
                stored: 2100,
                received: 2100,
                ..Default::default()
            }],
            shards: vec![ShardStats {
                state: "running".into(),
                flush_written_bytes: 4 << 20,
                merge_written_bytes: 6 << 20,
                merging: "small files".into(),
                merging_bytes: 3 << 20,
                merged_bytes: 1 << 20,
                ..Default::default()
            }],
            lcores: vec![LcoreStats {
                busy_cycles: 1,
                idle_cycles: 3,
                role: "rx".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let text = tables(&now, Some(&before));
        for part in [
            "fragment 10",
            "queue 0 18",
            "queue 1 12",
            " 15 ",
            " 1000 ",
            "25.0%",
            "running",
            " 2.50 ",
            "small files: 1.0 MiB of 3.0 MiB",
            "Every account adds up.",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        now.memory = Some(MemoryStats {
            budget: 1 << 30,
            taken: 3 << 20,
            accounts: vec![AccountStats {
                name: "dedupe".into(),
                limit: 8 << 20,
                used: 2 << 20,
                refused: 77,
                over: 5,
                at_limit: "some go".into(),
                ..Default::default()
            }],
            heap: Some(1 << 20),
            ..Default::default()
        });
        let text = tables(&now, None);
        for part in [
            "3.0 MiB of a budget of 1.0 GiB",
            "some go",
            "77 (5 over)",
            "1.0 MiB are",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        now.topics[0].received = 2101;
        assert!(tables(&now, None).contains("DOES NOT ADD UP: topic ticks"));
    }
}
