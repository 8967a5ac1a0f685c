//! Members join, get their assignments, beat and leave.
//!
//! A rebalance has two phases. In the first every member sends JoinGroup and waits until all have, or
//! the rebalance time-out has thrown out the rest; the answers tell the leader of all members. In the
//! second every member sends SyncGroup and waits until the leader's assignment is in the log.

use std::sync::Arc;

use super::group::{JoinTimer, Parked, protocol_field, refused_join, refused_sync};
use super::records::GroupValue;
use super::*;

/// Memory of a new member beside its protocols: its names are that long at most.
const NEW_MEMBER_COST: usize = 4096;

impl Coordinator {
    pub(super) fn join(
        &mut self,
        token: Token,
        context: &Context<'_>,
        request: &JoinGroupRequest<'_>,
    ) {
        let refuse = |io: &mut Io, error| {
            let response = refused_join(context.version, &request.member_id, error);
            io.answer(token, Response::JoinGroup(response));
        };
        if !self.groups.contains_key(&*request.group_id) {
            if !request.member_id.is_empty() {
                return refuse(&mut self.io, Code::UnknownMemberId);
            }
            if !self.may_create(&request.group_id) {
                return refuse(&mut self.io, Code::CoordinatorNotAvailable);
            }
            group_entry(&mut self.groups, &mut self.io, &request.group_id);
        }
        let asked: usize = request
            .protocols
            .iter()
            .map(|protocol| 256 + 2 * protocol.name.len() + protocol.metadata.len())
            .sum();
        // Who is in already needs room only for what it has more to say.
        let member = self
            .groups
            .get(&*request.group_id)
            .and_then(|group| group.members.get(&*request.member_id));
        let growth = match member {
            Some(member) => asked.saturating_sub(member.cost(&request.member_id)),
            None => asked + NEW_MEMBER_COST,
        };
        let fits = self.io.has_room(growth, 0);
        self.with(&request.group_id, |group, io| match group {
            Some(group) if fits => group.join(io, token, context, request),
            _ => refuse(io, Code::CoordinatorNotAvailable),
        });
    }

    pub(super) fn leave(&mut self, token: Token, version: i16, request: LeaveGroupRequest<'_>) {
        let LeaveGroupRequest {
            group_id,
            member_id,
            mut members,
        } = request;
        // Until version 2 there was one, at the top.
        if version < 3 {
            members = vec![LeaveGroupMember {
                member_id,
                ..LeaveGroupMember::default()
            }];
        }
        let results = self.with(&group_id, |group, io| match group {
            Some(group) => group.leave(io, &members),
            None => members.iter().map(|_| Code::UnknownMemberId).collect(),
        });
        let error_code = match results[..] {
            [error] if version < 3 => error,
            _ => Code::None,
        };
        let members = members
            .iter()
            .zip(results)
            .map(|(member, error_code)| LeaveGroupResult {
                member_id: member.member_id.to_string().into(),
                group_instance_id: member
                    .group_instance_id
                    .as_ref()
                    .map(|id| id.to_string().into()),
                error_code,
            })
            .collect();
        let response = LeaveGroupResponse {
            error_code,
            members,
            ..LeaveGroupResponse::default()
        };
        self.io.answer(token, Response::LeaveGroup(response));
    }
}

fn protocols_of(request: &JoinGroupRequest<'_>) -> Vec<Protocol> {
    request
        .protocols
        .iter()
        .map(|protocol| Protocol {
            name: protocol.name.to_string(),
            metadata: protocol.metadata.to_vec(),
        })
        .collect()
}

/// Session and rebalance time-out; the request was admitted, and version 0 knows but the first.
fn timeouts_of(request: &JoinGroupRequest<'_>) -> (u32, u32) {
    let session = request.session_timeout_ms.max(0) as u32;
    let rebalance = u32::try_from(request.rebalance_timeout_ms).unwrap_or(session);
    (session, rebalance)
}

impl Group {
    // Loading.

    /// Takes over what a record says; nothing of what was before stays but the offsets.
    pub(super) fn restore(&mut self, io: &mut Io, value: &GroupValue<'_>) {
        while let Some(id) = self.members.keys().next().cloned() {
            self.remove_member(io, &id);
        }
        self.generation = value.generation;
        self.protocol = value.protocol.map(str::to_owned);
        self.state_since = Some(value.state_timestamp).filter(|&at| at >= 0);
        self.persisted = true;
        self.protocol_type =
            Some(value.protocol_type.to_owned()).filter(|protocol_type| !protocol_type.is_empty());
        for member in &value.members {
            let protocols = value
                .protocol
                .iter()
                .map(|name| Protocol {
                    name: name.to_string(),
                    metadata: member.subscription.to_vec(),
                })
                .collect();
            let session_timeout_ms = u32::try_from(member.session_timeout_ms).unwrap_or(0);
            let restored = Member {
                instance_id: member.group_instance_id.map(Into::into),
                client_id: member.client_id.to_owned(),
                client_host: member.client_host.to_owned(),
                rebalance_timeout_ms: u32::try_from(member.rebalance_timeout_ms)
                    .unwrap_or(session_timeout_ms),
                session_timeout_ms,
                protocols,
                assignment: member.assignment.to_vec(),
                ..Member::default()
            };
            self.add_member(io, member.member_id.into(), value.protocol_type, restored);
        }
        let leader = value
            .leader
            .and_then(|leader| self.members.get_key_value(leader));
        if let Some((leader, _)) = leader {
            self.leader = Some(leader.clone());
        }
        self.state = if self.members.is_empty() {
            State::Empty
        } else {
            State::Stable
        };
    }

    /// The group has been loaded: sessions begin now.
    pub(super) fn resume(&mut self, io: &mut Io) {
        let ids: Vec<Arc<str>> = self.members.keys().cloned().collect();
        for id in &ids {
            self.renew_session(io, id, None);
        }
        if self.members.len() > io.config.max_group_size {
            self.prepare_rebalance(io);
        }
    }

    // Joining.

    /// Whether the group has room for who asks. Members that are in and have joined stay; while a
    /// rebalance is under way the last to come are out.
    fn accepts(&self, io: &Io, id: &str) -> bool {
        let member = self.members.get(id);
        match self.state {
            State::Empty => true,
            State::PreparingRebalance => {
                member.is_some_and(|member| member.join.is_some())
                    || self.joining() < io.config.max_group_size
            }
            State::CompletingRebalance | State::Stable => {
                member.is_some() || self.members.len() < io.config.max_group_size
            }
        }
    }

    fn join(
        &mut self,
        io: &mut Io,
        token: Token,
        context: &Context<'_>,
        request: &JoinGroupRequest<'_>,
    ) {
        let id = &*request.member_id;
        let parked = Parked {
            token,
            version: context.version,
        };
        let refuse = |io: &mut Io, id: &str, error| {
            let response = refused_join(context.version, id, error);
            io.answer(token, Response::JoinGroup(response));
        };
        if !self.accepts(io, id) {
            self.remove_member(io, id);
            self.drop_pending(io, id);
            refuse(io, "", Code::GroupMaxSizeReached);
            self.maybe_complete_join(io);
        } else if !self.supports(&request.protocol_type, &request.protocols) {
            refuse(io, id, Code::InconsistentGroupProtocol);
        } else if id.is_empty() {
            self.join_new(io, parked, context, request);
        } else if self.pending.contains_key(id) {
            if request.group_instance_id.is_some() {
                // Such an id is given to dynamic members alone.
                refuse(io, id, Code::UnknownMemberId);
            } else {
                self.admit_member(io, id.into(), parked, context, request);
            }
        } else if let Err(error) = self.validate_member(id, request.group_instance_id.as_deref()) {
            refuse(io, id, error);
        } else {
            self.join_again(io, parked, request);
        }
    }

    fn join_new(
        &mut self,
        io: &mut Io,
        parked: Parked,
        context: &Context<'_>,
        request: &JoinGroupRequest<'_>,
    ) {
        if let Some(instance) = &request.group_instance_id {
            let new = io.new_member_id(instance);
            match self.static_member(instance).cloned() {
                Some(old) => self.join_static_again(io, parked, request, &old, new),
                None => self.admit_member(io, new, parked, context, request),
            }
            return;
        }
        let new = io.new_member_id(context.client_id);
        if parked.version < 4 {
            self.admit_member(io, new, parked, context, request);
        } else if self.pending.len() >= io.config.max_group_size {
            let response = refused_join(parked.version, "", Code::GroupMaxSizeReached);
            io.answer(parked.token, Response::JoinGroup(response));
        } else {
            let response = refused_join(parked.version, &new, Code::MemberIdRequired);
            let (session, _) = timeouts_of(request);
            self.add_pending(io, new, session);
            io.answer(parked.token, Response::JoinGroup(response));
        }
    }

    fn admit_member(
        &mut self,
        io: &mut Io,
        id: Arc<str>,
        parked: Parked,
        context: &Context<'_>,
        request: &JoinGroupRequest<'_>,
    ) {
        let (session_timeout_ms, rebalance_timeout_ms) = timeouts_of(request);
        let member = Member {
            instance_id: request.group_instance_id.as_deref().map(Into::into),
            client_id: context.client_id.to_owned(),
            client_host: context.client_host.to_owned(),
            rebalance_timeout_ms,
            session_timeout_ms,
            protocols: protocols_of(request),
            join: Some(parked),
            is_new: true,
            ..Member::default()
        };
        if self.state == State::PreparingRebalance && self.initial {
            self.new_member_added = true;
        }
        self.add_member(io, id.clone(), &request.protocol_type, member);
        // It cannot send heartbeats before it knows its id. If its client is gone, its request must not
        // hold up rebalances for ever; if it is there, it comes again.
        self.renew_session(io, &id, Some(io.config.new_member_join_timeout_ms));
        self.rebalance(io);
    }

    fn join_again(&mut self, io: &mut Io, parked: Parked, request: &JoinGroupRequest<'_>) {
        let id = &*request.member_id;
        let same = self
            .members
            .get(id)
            .is_some_and(|member| member.matches(&request.protocols));
        let is_leader = self.leader.as_deref() == Some(id);
        let goes_on = match self.state {
            // Its answer was lost: it gets it again.
            State::CompletingRebalance => same,
            // The leader asks for a rebalance by it, when partitions have changed; others just get
            // what holds.
            State::Stable => same && !is_leader,
            State::PreparingRebalance | State::Empty => false,
        };
        if goes_on {
            let members = is_leader && self.state == State::CompletingRebalance;
            let response = self.joined(parked.version, id, members);
            io.answer(parked.token, Response::JoinGroup(response));
        } else {
            let (session, rebalance) = timeouts_of(request);
            self.update_member(io, id, protocols_of(request), rebalance, session);
            self.park_join(io, id, parked);
            self.rebalance(io);
        }
    }

    /// A static member has started again: it takes the old one's place, without a rebalance if the
    /// group is stable and its protocol stays.
    fn join_static_again(
        &mut self,
        io: &mut Io,
        parked: Parked,
        request: &JoinGroupRequest<'_>,
        old: &str,
        new: Arc<str>,
    ) {
        let leader_before = self.leader.clone();
        self.replace_member(io, old, new.clone());
        let (session, rebalance) = timeouts_of(request);
        self.update_member(io, &new, protocols_of(request), rebalance, session);
        self.park_join(io, &new, parked);
        self.renew_session(io, &new, None);
        match self.state {
            State::Stable if self.select_protocol() == self.protocol => {
                let record = self.record(|_, member| member.assignment.clone());
                let effect = Effect::StaticJoin {
                    member: new,
                    generation: self.generation,
                    leader_before,
                };
                self.append_group(io, record, effect);
            }
            // The leader may already assign to the old id: let it assign again.
            State::CompletingRebalance => self.prepare_rebalance(io),
            _ => self.rebalance(io),
        }
    }

    /// The answer to a member that is through the first phase; `members`: it is to assign.
    fn joined(&self, version: i16, id: &str, members: bool) -> JoinGroupResponse<'static> {
        let members = if members {
            self.joined_members()
        } else {
            Vec::new()
        };
        JoinGroupResponse {
            generation_id: self.generation,
            protocol_type: self.protocol_type.clone().map(Into::into),
            protocol_name: protocol_field(version, self.protocol.as_deref()),
            leader: self.leader.as_deref().unwrap_or_default().to_owned().into(),
            member_id: id.to_owned().into(),
            members,
            ..JoinGroupResponse::default()
        }
    }

    fn joined_members(&self) -> Vec<JoinGroupMember<'static>> {
        let protocol = self.protocol.as_deref().unwrap_or_default();
        self.members
            .iter()
            .map(|(id, member)| JoinGroupMember {
                member_id: id.to_string().into(),
                group_instance_id: member.instance_id.as_ref().map(|id| id.to_string().into()),
                metadata: member
                    .metadata(protocol)
                    .unwrap_or_default()
                    .to_vec()
                    .into(),
            })
            .collect()
    }

    // The first phase.

    /// Begins a rebalance, or ends its first phase if all have joined.
    fn rebalance(&mut self, io: &mut Io) {
        match self.state {
            State::PreparingRebalance => self.maybe_complete_join(io),
            _ => self.prepare_rebalance(io),
        }
    }

    fn prepare_rebalance(&mut self, io: &mut Io) {
        if self.state == State::CompletingRebalance {
            let ids: Vec<Arc<str>> = self.members.keys().cloned().collect();
            for id in &ids {
                self.set_assignment(io, id, Vec::new());
                self.finish_sync(io, id, Code::RebalanceInProgress);
            }
        }
        self.clear_sync(io);
        self.initial = self.state == State::Empty;
        self.new_member_added = false;
        self.set_state(io, State::PreparingRebalance);
        if self.initial {
            let delay_ms = u64::from(io.config.initial_rebalance_delay_ms);
            let left_ms = self.rebalance_timeout_ms().saturating_sub(delay_ms);
            self.set_join_timer(io, delay_ms, JoinTimer::Initial { delay_ms, left_ms });
        } else if self.has_all_joined() {
            self.complete_join(io);
        } else {
            let timeout_ms = self.rebalance_timeout_ms();
            self.set_join_timer(io, timeout_ms, JoinTimer::Complete);
        }
    }

    fn maybe_complete_join(&mut self, io: &mut Io) {
        if self.state == State::PreparingRebalance && !self.initial && self.has_all_joined() {
            self.complete_join(io);
        }
    }

    fn set_join_timer(&mut self, io: &mut Io, after_ms: u64, timer: JoinTimer) {
        self.clear_join_timer(io);
        let at = io.now.mono_ms + after_ms;
        self.join_timer = Some((at, timer));
        io.timers.insert(at, Timer::Join(self.id.clone()));
    }

    fn clear_join_timer(&mut self, io: &mut Io) {
        if let Some((at, _)) = self.join_timer.take() {
            io.timers.remove(at, Timer::Join(self.id.clone()));
        }
    }

    pub(super) fn join_due(&mut self, io: &mut Io) {
        match self.join_timer.take() {
            Some((_, JoinTimer::Initial { delay_ms, left_ms }))
                if self.new_member_added && left_ms > 0 =>
            {
                self.new_member_added = false;
                let next_ms = u64::from(io.config.initial_rebalance_delay_ms).min(left_ms);
                let timer = JoinTimer::Initial {
                    delay_ms: next_ms,
                    left_ms: left_ms.saturating_sub(delay_ms),
                };
                self.set_join_timer(io, next_ms.max(1), timer);
            }
            _ => self.complete_join(io),
        }
    }

    /// Ends the first phase with the members that have joined, and static ones that may come back.
    fn complete_join(&mut self, io: &mut Io) {
        self.clear_join_timer(io);
        let late: Vec<Arc<str>> = self
            .members
            .iter()
            .filter(|(_, member)| member.join.is_none() && member.instance_id.is_none())
            .map(|(id, _)| id.clone())
            .collect();
        for id in &late {
            self.remove_member(io, id);
        }
        if !self.members.is_empty() && !self.elect_joined_leader() {
            // Static members alone, and none has come: wait until one does or their sessions end.
            let timeout_ms = self.rebalance_timeout_ms();
            self.set_join_timer(io, timeout_ms, JoinTimer::Complete);
            return;
        }
        self.initial = false;
        self.generation = self.generation.checked_add(1).unwrap_or(0);
        self.clear_sync(io);
        if self.members.is_empty() {
            self.protocol = None;
            self.set_state(io, State::Empty);
            let record = self.record(|_, _| Vec::new());
            self.append(io, vec![record], Effect::Emptied, None);
            return;
        }
        self.protocol = self.select_protocol();
        self.set_state(io, State::CompletingRebalance);
        let ids: Vec<Arc<str>> = self.members.keys().cloned().collect();
        for id in &ids {
            let is_leader = self.leader.as_ref() == Some(id);
            let mut response = self.joined(0, id, is_leader);
            let protocol = self.protocol.clone();
            self.finish_join_with(io, id, |version| {
                response.protocol_name = protocol_field(version, protocol.as_deref());
                response
            });
            self.renew_session(io, id, None);
            if let Some(member) = self.members.get_mut(id) {
                member.is_new = false;
            }
            self.owe_sync.insert(id.clone());
        }
        let at = io.now.mono_ms + self.rebalance_timeout_ms();
        self.sync_timer = Some(at);
        io.timers.insert(at, Timer::Sync(self.id.clone()));
    }

    /// A leader that has not come gives way to a member that has; whether there is one.
    fn elect_joined_leader(&mut self) -> bool {
        let joined = |member: &Member| member.join.is_some();
        let leader = self.leader.as_ref().and_then(|id| self.members.get(id));
        if leader.is_some_and(joined) {
            return true;
        }
        let next = self.members.iter().find(|(_, member)| joined(member));
        match next {
            Some((id, _)) => {
                self.leader = Some(id.clone());
                true
            }
            None => false,
        }
    }

    // The second phase.

    fn validate_sync(&self, request: &SyncGroupRequest<'_>) -> Result<(), Code> {
        if self.state == State::Empty {
            return Err(Code::UnknownMemberId);
        }
        let instance = request.group_instance_id.as_deref();
        self.validate_member(&request.member_id, instance)?;
        if request.generation_id != self.generation {
            return Err(Code::IllegalGeneration);
        }
        let differs = |theirs: &Option<std::borrow::Cow<'_, str>>, own: &Option<String>| match (
            theirs, own,
        ) {
            (Some(theirs), Some(own)) => theirs != own,
            _ => false,
        };
        if differs(&request.protocol_type, &self.protocol_type)
            || differs(&request.protocol_name, &self.protocol)
        {
            return Err(Code::InconsistentGroupProtocol);
        }
        Ok(())
    }

    pub(super) fn sync(&mut self, io: &mut Io, token: Token, request: &SyncGroupRequest<'_>) {
        let id = &*request.member_id;
        if let Err(error) = self.validate_sync(request) {
            return io.answer(token, refused_sync(error));
        }
        match self.state {
            State::Empty | State::PreparingRebalance => {
                io.answer(token, refused_sync(Code::RebalanceInProgress));
            }
            State::Stable => {
                self.sync_came(io, id);
                let response = self.assignment_of(id);
                io.answer(token, response);
            }
            State::CompletingRebalance => {
                self.sync_came(io, id);
                self.park_sync(io, id, token);
                // What the leader said first holds, so that the log's last word is what members got.
                if self.leader.as_deref() == Some(id) && !self.is_assigning() {
                    self.assign(io, &request.assignments);
                }
            }
        }
    }

    fn is_assigning(&self) -> bool {
        self.in_flight.iter().any(|append| {
            matches!(append.effect, Effect::Assignment { generation, .. } if generation == self.generation)
        })
    }

    fn assign(&mut self, io: &mut Io, assignments: &[SyncGroupAssignment<'_>]) {
        // The members' ids are shared with the map, which is as long as the group's.
        let assignments: Vec<(Arc<str>, Vec<u8>)> = {
            let by_id: HashMap<&str, &[u8]> = assignments
                .iter()
                .map(|one| (&*one.member_id, &*one.assignment))
                .collect();
            self.members
                .keys()
                .map(|id| {
                    let assignment = by_id.get(&**id).copied().unwrap_or_default();
                    (id.clone(), assignment.to_vec())
                })
                .collect()
        };
        let bytes = assignments.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut next = assignments.iter();
        // Members and assignments are in the same order.
        let record = self.record(|_, _| next_assignment(&mut next));
        let generation = self.generation;
        let fits = io.has_room(bytes, record.size() + bytes);
        if !fits {
            return self.assignment_ended(
                io,
                generation,
                Vec::new(),
                Err(AppendError::Unavailable),
            );
        }
        let effect = Effect::Assignment {
            generation,
            assignments,
        };
        self.append_group(io, record, effect);
    }

    /// Appends the group's record if it is not too long for the log.
    fn append_group(&mut self, io: &mut Io, record: OffsetsRecord, effect: Effect) {
        if record.size() > io.config.max_append_bytes {
            self.apply(io, effect, Err(AppendError::TooLarge));
        } else {
            self.append(io, vec![record], effect, None);
        }
    }

    fn sync_came(&mut self, io: &mut Io, id: &str) {
        self.owe_sync.remove(id);
        if self.owe_sync.is_empty() {
            self.clear_sync(io);
        }
    }

    fn clear_sync(&mut self, io: &mut Io) {
        self.owe_sync.clear();
        if let Some(at) = self.sync_timer.take() {
            io.timers.remove(at, Timer::Sync(self.id.clone()));
        }
    }

    /// Members that took part in the first phase and never asked for their assignment are out.
    pub(super) fn sync_due(&mut self, io: &mut Io) {
        self.sync_timer = None;
        let late: Vec<Arc<str>> = self.owe_sync.iter().cloned().collect();
        for id in &late {
            self.remove_member(io, id);
        }
        self.prepare_rebalance(io);
    }

    fn assignment_ended(
        &mut self,
        io: &mut Io,
        generation: i32,
        assignments: Vec<(Arc<str>, Vec<u8>)>,
        result: Result<(), AppendError>,
    ) {
        // Another rebalance may have begun meanwhile.
        if self.state != State::CompletingRebalance || self.generation != generation {
            return;
        }
        match result {
            Ok(()) => {
                for (id, assignment) in assignments {
                    self.set_assignment(io, &id, assignment);
                }
                self.set_state(io, State::Stable);
                io.rebalances += 1;
                let ids: Vec<Arc<str>> = self.members.keys().cloned().collect();
                for id in &ids {
                    self.finish_sync(io, id, Code::None);
                }
            }
            Err(error) => {
                let ids: Vec<Arc<str>> = self.members.keys().cloned().collect();
                for id in &ids {
                    self.finish_sync(io, id, error.code());
                }
                self.prepare_rebalance(io);
            }
        }
    }

    /// An append of this group has ended.
    pub(super) fn apply(&mut self, io: &mut Io, effect: Effect, result: Result<(), AppendError>) {
        match effect {
            Effect::Offsets(changes) => {
                if result.is_ok() {
                    for (topic, partition, value) in changes {
                        match value {
                            Some(value) => self.put_offset(io, &topic, partition, value),
                            None => self.remove_offset(io, &topic, partition),
                        }
                    }
                }
            }
            Effect::Assignment {
                generation,
                assignments,
            } => self.assignment_ended(io, generation, assignments, result),
            Effect::StaticJoin {
                member,
                generation,
                leader_before,
            } => {
                // Otherwise the rebalance that has begun meanwhile answers.
                if self.state == State::Stable && self.generation == generation {
                    self.static_join_ended(io, &member, leader_before, result);
                }
            }
            // If it is not in the log, the last generation's members come back after a restart, and
            // their sessions end.
            Effect::Emptied => {}
            Effect::Deleted => self.persisted |= result.is_err(),
        }
    }

    fn static_join_ended(
        &mut self,
        io: &mut Io,
        id: &str,
        leader_before: Option<Arc<str>>,
        result: Result<(), AppendError>,
    ) {
        if let Err(error) = result {
            // It comes again as unknown and is replaced again.
            return self
                .finish_join_with(io, id, |version| refused_join(version, "", error.code()));
        }
        let is_leader = self.leader.as_deref() == Some(id);
        let version = self
            .members
            .get(id)
            .and_then(|member| member.join)
            .map_or(0, |parked| parked.version);
        // A leader learns its group to watch its topics, but is not to assign anew. Before version 9
        // that could not be said, so it is told that the leader is the one that it was.
        let mut response = self.joined(version, id, is_leader && version >= 9);
        if version >= 9 {
            response.skip_assignment = is_leader;
        } else {
            response.leader = leader_before
                .as_deref()
                .unwrap_or_default()
                .to_owned()
                .into();
        }
        self.finish_join_with(io, id, |_| response);
    }

    // Staying and going.

    pub(super) fn heartbeat(&mut self, io: &mut Io, request: &HeartbeatRequest<'_>) -> Code {
        let id = &*request.member_id;
        if let Err(error) = self.validate_member(id, request.group_instance_id.as_deref()) {
            return error;
        }
        if request.generation_id != self.generation {
            return Code::IllegalGeneration;
        }
        self.renew_session(io, id, None);
        match self.state {
            State::PreparingRebalance => Code::RebalanceInProgress,
            _ => Code::None,
        }
    }

    fn leave(&mut self, io: &mut Io, members: &[LeaveGroupMember<'_>]) -> Vec<Code> {
        let mut left = false;
        let mut results = Vec::with_capacity(members.len());
        for member in members {
            let id = &*member.member_id;
            let instance = member.group_instance_id.as_deref();
            let error = if id.is_empty() {
                // An administrator removes a static member by its instance id alone.
                let id = instance.and_then(|instance| self.static_member(instance).cloned());
                match id {
                    Some(id) => {
                        self.remove_member(io, &id);
                        Code::None
                    }
                    None => Code::UnknownMemberId,
                }
            } else if self.drop_pending(io, id) {
                Code::None
            } else {
                match self.validate_member(id, instance) {
                    Ok(()) => {
                        self.remove_member(io, id);
                        Code::None
                    }
                    Err(error) => error,
                }
            };
            left |= error == Code::None;
            results.push(error);
        }
        if left && self.state != State::Empty {
            self.rebalance(io);
        }
        results
    }

    /// A session's entry in the timer queue is due.
    pub(super) fn session_due(&mut self, io: &mut Io, at: u64, id: &str) {
        if self.pending.get(id) == Some(&at) {
            self.drop_pending(io, id);
            return self.maybe_complete_join(io);
        }
        let Some((key, _)) = self.members.get_key_value(id) else {
            return;
        };
        let key = key.clone();
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        if member.timer != Some(at) {
            return;
        }
        member.timer = None;
        if member.deadline > io.now.mono_ms {
            member.timer = Some(member.deadline);
            let at = member.deadline;
            io.timers.insert(at, Timer::Session(self.id.clone(), key));
        } else if !member.waits() {
            io.expired_members += 1;
            self.remove_member(io, id);
            match self.state {
                State::PreparingRebalance => self.maybe_complete_join(io),
                State::Empty => {}
                State::CompletingRebalance | State::Stable => self.prepare_rebalance(io),
            }
        }
    }
}

fn next_assignment(next: &mut std::slice::Iter<'_, (Arc<str>, Vec<u8>)>) -> Vec<u8> {
    next.next()
        .map_or_else(Vec::new, |(_, bytes)| bytes.clone())
}
