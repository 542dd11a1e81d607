-- Missions: tasks that run as one thing, what stands between them, and when they begin.

create table missions (
    project_id uuid not null,
    id uuid not null,
    name text not null,
    status text not null check (status in ('draft', 'scheduled', 'recurring', 'active', 'paused', 'completed', 'failed', 'cancelled')),
    -- Why it stands there.
    reason text,
    -- The definition: read to show, edit and execute it, never to advance a run.
    document jsonb not null,
    execution_count integer not null default 0,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (project_id, id),
    constraint missions_name_key unique (project_id, name)
);

create index missions_by_status on missions (project_id, status, id);

-- Whoever decides what becomes of a run holds its row until the commit, so that two tasks that end at once see each other.
create table mission_runs (
    project_id uuid not null,
    mission_id uuid not null,
    number integer not null,
    group_label text not null,
    -- The schedule that began it.
    schedule_id uuid,
    -- What its tasks are told: the mission's name, prompt and data.
    context jsonb not null,
    quality_threshold double precision not null,
    -- Whether it brought agents along that go when it ends.
    volatile_team boolean not null,
    -- When it must have ended.
    deadline timestamptz,
    sla_warned boolean not null default false,
    -- Paused by hand.
    held boolean not null default false,
    started_at timestamptz not null,
    ended_at timestamptz,
    passed boolean,
    report jsonb,
    primary key (project_id, mission_id, number),
    constraint mission_runs_mission_fkey foreign key (project_id, mission_id) references missions (project_id, id) on delete cascade
);

alter table tasks add column mission_id uuid;
alter table tasks add column mission_run integer;
alter table tasks add constraint tasks_mission_fkey
    foreign key (project_id, mission_id, mission_run) references mission_runs (project_id, mission_id, number);
create index tasks_by_mission on tasks (project_id, mission_id, mission_run, id) where mission_id is not null;
create index tasks_unfinished_by_mission on tasks (project_id, mission_id, mission_run, id)
    where mission_id is not null and status not in ('done', 'failed');
-- Titles of a mission's tasks are unique within its run, which its definition sees to.
drop index tasks_title_key;
create unique index tasks_title_key on tasks (project_id, title) where status not in ('done', 'failed') and mission_id is null;
-- `dependsOn` may name a task by its title. Of missions' tasks it names the id.
create index tasks_finished_by_title on tasks (project_id, title, id) where status in ('done', 'failed') and mission_id is null;

-- What stands between the tasks of a run: checkpoints, quality gates, delays.
--   waiting: what it follows has not ended.
--   active:  a checkpoint that waits for people, a delay that has begun.
--   failed:  a gate that is closed.
--   passed:  it holds nothing back any more, in this run.
create table barriers (
    project_id uuid not null,
    id uuid not null,
    mission_id uuid not null,
    run integer not null,
    kind text not null check (kind in ('checkpoint', 'gate', 'delay')),
    name text not null,
    state text not null check (state in ('waiting', 'active', 'failed', 'passed')),
    document jsonb not null,
    reason text,
    reached_at timestamptz,
    expires_at timestamptz,
    primary key (project_id, id),
    constraint barriers_run_fkey foreign key (project_id, mission_id, run)
        references mission_runs (project_id, mission_id, number) on delete cascade
);

create index barriers_by_run on barriers (project_id, mission_id, run, kind, name);
create index barriers_reached on barriers (project_id, kind, id) where state in ('active', 'failed');

-- The tasks that a barrier follows.
create table barrier_follows (
    project_id uuid not null,
    task_id uuid not null,
    barrier_id uuid not null,
    primary key (project_id, task_id, barrier_id),
    constraint barrier_follows_task_fkey foreign key (project_id, task_id) references tasks (project_id, id) on delete cascade,
    constraint barrier_follows_barrier_fkey foreign key (project_id, barrier_id) references barriers (project_id, id) on delete cascade
);

create index barrier_follows_by_barrier on barrier_follows (project_id, barrier_id);

-- The tasks that a barrier holds back; the rows go when it has passed.
create table barrier_holds (
    project_id uuid not null,
    task_id uuid not null,
    barrier_id uuid not null,
    primary key (project_id, task_id, barrier_id),
    constraint barrier_holds_task_fkey foreign key (project_id, task_id) references tasks (project_id, id) on delete cascade,
    constraint barrier_holds_barrier_fkey foreign key (project_id, barrier_id) references barriers (project_id, id) on delete cascade
);

create index barrier_holds_by_barrier on barrier_holds (project_id, barrier_id);

create table schedules (
    project_id uuid not null,
    id uuid not null,
    mission_id uuid not null,
    expression text not null,
    timezone text,
    recurring boolean not null,
    enabled boolean not null,
    end_date timestamptz,
    deadline_offset_ms bigint,
    catch_up text not null check (catch_up in ('latest', 'skip')),
    overlap text not null check (overlap in ('skip', 'queue')),
    -- A firing waits for the run under way to end.
    queued boolean not null default false,
    last_run_at timestamptz,
    next_run_at timestamptz,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (project_id, id),
    constraint schedules_mission_key unique (project_id, mission_id),
    constraint schedules_mission_fkey foreign key (project_id, mission_id) references missions (project_id, id) on delete cascade
);
