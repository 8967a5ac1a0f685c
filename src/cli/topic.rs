//! `taffrail topic`: topics of the running server are made, listed, described, changed and deleted.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use super::table::{bytes, print};
use super::{CliResult, ServerArgs};
use crate::control::client::ControlClient;
use crate::control::names;
use crate::control::protocol::{TopicChange, TopicInfo};
use crate::storage::topic_settings;

/// Make, list, describe, change and delete topics of the running server
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a topic
    Create {
        /// Its name
        name: String,
        /// Its number of partitions
        #[arg(long, short, value_name = "N", default_value_t = 1)]
        partitions: u32,
        /// Do nothing where there is such a topic already
        #[arg(long)]
        if_not_exists: bool,
        #[command(flatten)]
        settings: Settings,
    },
    /// List the topics with their partitions, bytes and messages
    List {
        /// Print an array of objects, with the bounds of each partition
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Show a topic's settings and partitions
    Describe {
        /// Its name
        name: String,
        /// Print an object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Change a topic's settings, or give it more partitions
    Alter {
        /// Its name
        name: String,
        /// How many partitions it has then in all; messages stay where they are
        #[arg(long, short, value_name = "N")]
        partitions: Option<u32>,
        /// Put a setting back to its default
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        delete_config: Vec<String>,
        #[command(flatten)]
        settings: Settings,
    },
    /// Delete topics with their messages
    Delete {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// Settings, and how to find the server: `--config` is Kafka's tools' name for the one, and ours for the other.
#[derive(Debug, clap::Args)]
struct Settings {
    /// Set a setting, such as retention.ms=86400000; what has no "=" is the running server's configuration, as elsewhere
    #[arg(long, short, value_name = "NAME=VALUE")]
    config: Vec<String>,
    /// Control socket of the running server
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl Settings {
    /// The settings, and the server.
    fn take(&self) -> Result<(BTreeMap<String, String>, ServerArgs), String> {
        let mut settings = BTreeMap::new();
        let mut server = ServerArgs {
            socket: self.socket.clone(),
            config: None,
        };
        for text in &self.config {
            match text.split_once('=') {
                Some((name, value)) => {
                    topic_settings::check(name, Some(value))?;
                    if settings.insert(name.to_owned(), value.to_owned()).is_some() {
                        return Err(format!("{name} is set twice"));
                    }
                }
                None if server.config.is_some() || self.socket.is_some() => {
                    return Err(format!(
                        "--config {text:?} is no setting NAME=VALUE, and the server is named already"
                    ));
                }
                None => server.config = Some(text.into()),
            }
        }
        Ok((settings, server))
    }
}

fn connect(server: &ServerArgs) -> Result<ControlClient, Box<dyn std::error::Error + Send + Sync>> {
    Ok(ControlClient::connect(&server.socket_path()?)?)
}

fn find<'a>(topics: &'a [TopicInfo], name: &str) -> Result<&'a TopicInfo, String> {
    let found = topics.iter().find(|topic| topic.name == name);
    found.ok_or_else(|| names::unknown_topic(name, topics.iter().map(|t| t.name.as_str())))
}

/// Does what the subcommand says.
pub fn run(args: &Args) -> CliResult {
    match &args.command {
        Command::Create {
            name,
            partitions,
            if_not_exists,
            settings,
        } => {
            let (settings, server) = settings.take()?;
            let mut client = connect(&server)?;
            let exists = |topics: &[TopicInfo]| topics.iter().any(|topic| &topic.name == name);
            if *if_not_exists && exists(&client.topics()?) {
                eprintln!("there is a topic {name} already");
                return Ok(());
            }
            client.change(TopicChange::Create {
                name: name.clone(),
                partitions: *partitions,
                settings,
            })?;
            eprintln!("made topic {name} with {partitions} partitions");
            Ok(())
        }
        Command::List { json, server } => list(&connect(server)?.topics()?, *json),
        Command::Describe { name, json, server } => {
            describe(find(&connect(server)?.topics()?, name)?, *json)
        }
        Command::Alter {
            name,
            partitions,
            delete_config,
            settings,
        } => alter(name, *partitions, delete_config, settings),
        Command::Delete { names, yes, server } => delete(names, *yes, &mut connect(server)?),
    }
}

fn messages(topic: &TopicInfo) -> i64 {
    let partitions = topic.partitions.iter();
    partitions
        .map(|p| (p.high_watermark - p.start).max(0))
        .sum()
}

fn size(topic: &TopicInfo) -> u64 {
    topic.partitions.iter().map(|p| p.bytes).sum()
}

fn object(topic: &TopicInfo) -> serde_json::Value {
    let partitions = topic.partitions.iter().enumerate();
    let partition = |(number, p): (usize, &crate::control::protocol::PartitionInfo)| {
        json!({
            "partition": number, "shard": p.shard, "start": p.start, "end": p.high_watermark,
            "bytes": p.bytes,
        })
    };
    json!({
        "topic": topic.name, "internal": topic.internal, "config": topic.settings,
        "offsets": messages(topic), "bytes": size(topic),
        "partitions": partitions.map(partition).collect::<Vec<_>>(),
    })
}

fn list(topics: &[TopicInfo], json: bool) -> CliResult {
    let mut topics: Vec<&TopicInfo> = topics.iter().collect();
    topics.sort_by(|a, b| a.name.cmp(&b.name));
    let mut out = std::io::stdout().lock();
    if json {
        let list: Vec<serde_json::Value> = topics.into_iter().map(object).collect();
        writeln!(out, "{}", serde_json::Value::from(list))?;
        return Ok(());
    }
    let rows = topics.iter().map(|topic| {
        let starts = topic.partitions.iter().map(|p| p.start);
        let ends = topic.partitions.iter().map(|p| p.high_watermark);
        vec![
            topic.name.clone(),
            topic.partitions.len().to_string(),
            span(starts),
            span(ends),
            messages(topic).to_string(),
            bytes(size(topic)),
        ]
    });
    let head = ["topic", "partitions", "start", "end", "offsets", "bytes"];
    print(&mut out, &head, 1, rows)
}

/// The least and the greatest of the partitions' offsets.
fn span(offsets: impl Iterator<Item = i64> + Clone) -> String {
    match (offsets.clone().min(), offsets.max()) {
        (Some(least), Some(most)) if least == most => least.to_string(),
        (Some(least), Some(most)) => format!("{least}..{most}"),
        _ => "-".to_owned(),
    }
}

fn describe(topic: &TopicInfo, json: bool) -> CliResult {
    let mut out = std::io::stdout().lock();
    if json {
        let mut object = object(topic);
        let effective: BTreeMap<&str, &str> = topic_settings::SETTINGS
            .iter()
            .map(|s| (s.name, topic_settings::value(&topic.settings, s.name)))
            .collect();
        object["effective_config"] = json!(effective);
        writeln!(out, "{object}")?;
        return Ok(());
    }
    writeln!(
        out,
        "topic {}{}: {} partitions, {} offsets, {}\n",
        topic.name,
        if topic.internal {
            " (the server's own)"
        } else {
            ""
        },
        topic.partitions.len(),
        messages(topic),
        bytes(size(topic))
    )?;
    let settings = topic_settings::SETTINGS.iter().map(|setting| {
        let set = topic.settings.contains_key(setting.name);
        vec![
            setting.name.to_owned(),
            topic_settings::value(&topic.settings, setting.name).to_owned(),
            if set { "" } else { "default" }.to_owned(),
        ]
    });
    print(&mut out, &["setting", "value", ""], 3, settings)?;
    writeln!(out)?;
    let partitions = topic.partitions.iter().enumerate().map(|(number, p)| {
        vec![
            number.to_string(),
            p.shard.to_string(),
            p.start.to_string(),
            p.high_watermark.to_string(),
            bytes(p.bytes),
        ]
    });
    let head = ["partition", "shard", "start", "end", "bytes"];
    print(&mut out, &head, 0, partitions)
}

fn alter(name: &str, partitions: Option<u32>, delete: &[String], settings: &Settings) -> CliResult {
    let (set, server) = settings.take()?;
    let mut changes: BTreeMap<String, Option<String>> = set
        .into_iter()
        .map(|(name, value)| (name, Some(value)))
        .collect();
    for setting in delete {
        topic_settings::check(setting, None)?;
        if changes.insert(setting.clone(), None).is_some() {
            return Err(format!("{setting} is both set and deleted, or named twice").into());
        }
    }
    if changes.is_empty() && partitions.is_none() {
        return Err("nothing to change: say -c NAME=VALUE, --delete-config or --partitions".into());
    }
    let mut client = connect(&server)?;
    let topics = client.topics()?;
    let have = find(&topics, name)?.partitions.len();
    if let Some(wanted) = partitions
        && wanted as usize <= have
    {
        return Err(format!(
            "topic {name} has {have} partitions; it may grow but not shrink (asked for {wanted})"
        )
        .into());
    }
    if let Some(partitions) = partitions {
        client.change(TopicChange::AddPartitions {
            name: name.to_owned(),
            partitions,
        })?;
        eprintln!("topic {name} has {partitions} partitions now");
    }
    if !changes.is_empty() {
        let changed: Vec<String> = changes.keys().cloned().collect();
        client.change(TopicChange::Alter {
            name: name.to_owned(),
            settings: changes,
        })?;
        eprintln!("topic {name}: changed {}", changed.join(", "));
    }
    Ok(())
}

fn delete(names: &[String], yes: bool, client: &mut ControlClient) -> CliResult {
    let topics = client.topics()?;
    for name in names {
        find(&topics, name)?;
    }
    if !yes {
        if !std::io::stdin().is_terminal() {
            return Err("deleting topics deletes their messages: say --yes".into());
        }
        for name in names {
            let topic = find(&topics, name)?;
            let (partitions, size) = (topic.partitions.len(), bytes(size(topic)));
            let count = messages(topic);
            eprintln!("topic {name}: {count} offsets in {partitions} partitions, {size}");
        }
        eprint!("Delete with all messages? [y/N] ");
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Err("nothing was deleted".into());
        }
    }
    for name in names {
        client.change(TopicChange::Delete { name: name.clone() })?;
        eprintln!("deleted topic {name}");
    }
    Ok(())
}
