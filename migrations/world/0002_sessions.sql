-- Conversations, and what each model call of them used.

create table sessions (
    project_id uuid not null,
    id uuid not null,
    title text,
    agent text,
    end_user text,
    metadata jsonb not null default '{}',
    message_count integer not null default 0,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (project_id, id)
);

create index sessions_by_activity on sessions (project_id, updated_at desc, id desc);
create index sessions_by_end_user on sessions (project_id, end_user, updated_at desc, id desc) where end_user is not null;
create index sessions_by_metadata on sessions using gin (metadata jsonb_path_ops) where metadata <> '{}';

-- `position` counts from 0 within a session without gaps; the messages of one turn are adjacent.
create table messages (
    project_id uuid not null,
    session_id uuid not null,
    position integer not null,
    id uuid not null,
    body jsonb not null,
    interrupted boolean not null default false,
    created_at timestamptz not null,
    primary key (project_id, session_id, position),
    constraint messages_session_fkey foreign key (project_id, session_id) references sessions (project_id, id) on delete cascade
);

create table runs (
    project_id uuid not null,
    id uuid not null,
    session_id uuid,
    agent_id uuid not null,
    status text not null check (status in ('finished', 'interrupted', 'failed')),
    started_at timestamptz not null,
    ended_at timestamptz not null,
    primary key (project_id, id)
);

create index runs_by_session on runs (project_id, session_id, id);

create table model_calls (
    project_id uuid not null,
    run_id uuid not null,
    number integer not null,
    id uuid not null,
    model text not null,
    prompt_tokens bigint not null,
    completion_tokens bigint not null,
    cached_tokens bigint not null,
    reasoning_tokens bigint not null,
    estimated boolean not null,
    primary key (project_id, run_id, number),
    constraint model_calls_run_fkey foreign key (project_id, run_id) references runs (project_id, id) on delete cascade
);
