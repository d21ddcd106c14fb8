-- The first schema. Times are REAL Unix seconds; booleans are 0 or 1; JSON is compact text.
-- Invariants stand here first and in Python second.

CREATE TABLE job_transitions (
    old TEXT NOT NULL,
    new TEXT NOT NULL,
    PRIMARY KEY (old, new)
) STRICT, WITHOUT ROWID;

-- mlbox.jobs.TRANSITIONS, pair by pair (a test compares the two).
INSERT INTO job_transitions (old, new) VALUES
    ('queued', 'starting'), ('queued', 'failed'), ('queued', 'cancelled'),
    ('starting', 'queued'), ('starting', 'running'), ('starting', 'succeeded'), ('starting', 'failed'),
    ('starting', 'cancelled'),
    ('running', 'queued'), ('running', 'succeeded'), ('running', 'failed'), ('running', 'cancelled');

CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user TEXT NOT NULL,
    uid INTEGER NOT NULL CHECK (uid >= 0),
    name TEXT NOT NULL,
    project TEXT NOT NULL,
    command TEXT,
    script TEXT,
    code TEXT,
    workdir TEXT,
    env TEXT NOT NULL DEFAULT '{}',
    gpus INTEGER NOT NULL CHECK (gpus >= 0),
    cpus INTEGER CHECK (cpus > 0),
    mem_mib INTEGER CHECK (mem_mib > 0),
    time_limit_s REAL CHECK (time_limit_s > 0),
    grace_s REAL NOT NULL CHECK (grace_s >= 0),
    priority INTEGER NOT NULL CHECK (priority BETWEEN -100 AND 100),
    retries INTEGER NOT NULL CHECK (retries >= 0),
    requeue INTEGER NOT NULL CHECK (requeue IN (0, 1)),
    model TEXT,
    hold INTEGER NOT NULL CHECK (hold IN (0, 1)),
    not_before REAL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'starting', 'running', 'succeeded', 'failed', 'cancelled')),
    reason TEXT CHECK (reason IN ('exit_code', 'signal', 'could_not_start', 'out_of_memory', 'gpu_out_of_memory',
        'time_limit', 'stalled', 'lost', 'reboot', 'dependency_failed', 'gpu_failed', 'user')),
    cause TEXT,
    submitted_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    cancel_requested_at REAL,
    attempt INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    failures INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    retry_of INTEGER REFERENCES jobs (id),
    idempotency_key TEXT,
    removed_at REAL,
    CHECK ((command IS NULL) <> (script IS NULL)),
    CHECK ((ended_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))),
    CHECK (state NOT IN ('starting', 'running') OR attempt > 0),
    CHECK (state NOT IN ('failed', 'cancelled') OR reason IS NOT NULL),
    CHECK (state <> 'queued' OR cancel_requested_at IS NULL)
) STRICT;

CREATE UNIQUE INDEX jobs_idempotency ON jobs (uid, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_by_state ON jobs (state, id);
CREATE INDEX jobs_by_uid ON jobs (uid, id);
CREATE INDEX jobs_by_model ON jobs (id) WHERE model IS NOT NULL AND state = 'succeeded';

CREATE TRIGGER jobs_begin_queued BEFORE INSERT ON jobs WHEN NEW.state <> 'queued'
BEGIN
    SELECT RAISE(ABORT, 'a job begins queued');
END;

CREATE TRIGGER jobs_move BEFORE UPDATE OF state ON jobs
WHEN OLD.state <> NEW.state
    AND NOT EXISTS (SELECT 1 FROM job_transitions WHERE old = OLD.state AND new = NEW.state)
BEGIN
    SELECT RAISE(ABORT, 'a job cannot make this move');
END;

CREATE TRIGGER jobs_stay BEFORE DELETE ON jobs
BEGIN
    SELECT RAISE(ABORT, 'a job is never deleted, only its files');
END;

-- How many jobs are in each state: counting 100,000 rows for every page would take milliseconds.
CREATE TABLE job_counts (
    state TEXT PRIMARY KEY,
    count INTEGER NOT NULL CHECK (count >= 0)
) STRICT, WITHOUT ROWID;

INSERT INTO job_counts (state, count) VALUES
    ('queued', 0), ('starting', 0), ('running', 0), ('succeeded', 0), ('failed', 0), ('cancelled', 0);

CREATE TRIGGER jobs_count_new AFTER INSERT ON jobs
BEGIN
    UPDATE job_counts SET count = count + 1 WHERE state = NEW.state;
END;

CREATE TRIGGER jobs_count_move AFTER UPDATE OF state ON jobs WHEN OLD.state <> NEW.state
BEGIN
    UPDATE job_counts SET count = count - 1 WHERE state = OLD.state;
    UPDATE job_counts SET count = count + 1 WHERE state = NEW.state;
END;

-- One row for each time a job was started. `attempt_key` is random and in the environment of every process of the
-- attempt, so that strays are known by it; `token_sha256` is of the job's own token, which dies with the attempt.
CREATE TABLE attempts (
    job_id INTEGER NOT NULL REFERENCES jobs (id),
    attempt INTEGER NOT NULL CHECK (attempt > 0),
    attempt_key TEXT NOT NULL UNIQUE,
    token_sha256 TEXT NOT NULL UNIQUE,
    gpu_uuids TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT,
    cause TEXT,
    cpu_seconds REAL,
    max_rss_mib REAL,
    max_gpu_mib REAL,
    log_bytes INTEGER,
    PRIMARY KEY (job_id, attempt)
) STRICT, WITHOUT ROWID;

-- Who holds a GPU. `share` is 0 for a whole GPU. A lease outlives its attempt until the GPU is seen to be clean.
CREATE TABLE leases (
    id INTEGER PRIMARY KEY,
    gpu_uuid TEXT NOT NULL,
    share INTEGER NOT NULL DEFAULT 0,
    job_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    leased_at REAL NOT NULL,
    released_at REAL CHECK (released_at >= leased_at),
    FOREIGN KEY (job_id, attempt) REFERENCES attempts (job_id, attempt)
) STRICT;

CREATE UNIQUE INDEX leases_one_holder ON leases (gpu_uuid, share) WHERE released_at IS NULL;
CREATE INDEX leases_by_attempt ON leases (job_id, attempt);

-- GPUs that an admin took out of service.
CREATE TABLE drained_gpus (
    gpu_uuid TEXT PRIMARY KEY,
    since REAL NOT NULL,
    by_user TEXT NOT NULL,
    reason TEXT
) STRICT, WITHOUT ROWID;

-- Credentials: only their SHA-256 is kept. A revoked row stays, for the record.
CREATE TABLE tokens (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL UNIQUE,
    last4 TEXT NOT NULL,
    user TEXT NOT NULL,
    uid INTEGER NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('user', 'deployer', 'admin')),
    scopes TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    last_used_at REAL,
    revoked_at REAL,
    idempotency_key TEXT
) STRICT;

CREATE UNIQUE INDEX tokens_idempotency ON tokens (uid, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX tokens_by_uid ON tokens (uid, id);

-- One-time codes for a browser. `token_id` is set where a token asked for the code or opened the session: what it
-- opened ends with it. `scopes` are never more than the asker's.
CREATE TABLE login_codes (
    sha256 TEXT PRIMARY KEY,
    user TEXT NOT NULL,
    uid INTEGER NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('user', 'deployer', 'admin')),
    scopes TEXT NOT NULL,
    token_id INTEGER REFERENCES tokens (id),
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    used_at REAL
) STRICT, WITHOUT ROWID;

CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    sha256 TEXT NOT NULL UNIQUE,
    user TEXT NOT NULL,
    uid INTEGER NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('user', 'deployer', 'admin')),
    scopes TEXT NOT NULL,
    token_id INTEGER REFERENCES tokens (id),
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    ended_at REAL
) STRICT;

CREATE INDEX sessions_live ON sessions (expires_at) WHERE ended_at IS NULL;

-- Where each model version came from. A row without `deployed_at` and `failed_at` is still to be carried out.
CREATE TABLE model_versions (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    version INTEGER NOT NULL CHECK (version > 0),
    job_id INTEGER REFERENCES jobs (id),
    path TEXT,
    sha256 TEXT,
    by_user TEXT NOT NULL,
    requested_at REAL NOT NULL,
    deployed_at REAL,
    failed_at REAL,
    cause TEXT,
    UNIQUE (model, version)
) STRICT;

-- A succeeded job deploys its own model once, whatever crashes in between.
CREATE UNIQUE INDEX model_versions_by_job ON model_versions (job_id) WHERE path IS NULL;
