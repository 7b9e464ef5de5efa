BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE lpsearch_claims (
	subject VARCHAR(640) NOT NULL, 
	owner VARCHAR(255) NOT NULL, 
	claimed_at DOUBLE NOT NULL, 
	PRIMARY KEY (subject)
);
CREATE TABLE lpsearch_evaluations (
	plan_id INTEGER NOT NULL, 
	split VARCHAR(16) NOT NULL, 
	window_idx INTEGER NOT NULL, 
	nll_nats_per_token DOUBLE, 
	kl_nats_per_token DOUBLE, 
	num_tokens INTEGER NOT NULL, 
	PRIMARY KEY (plan_id, split, window_idx), 
	FOREIGN KEY(plan_id) REFERENCES lpsearch_plans (id)
);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',0,3.0,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',1,3.1,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',2,3.2,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',3,3.3,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',4,3.4,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',5,3.5,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',6,3.6,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'proxy',7,3.7,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',0,3.01683101560694755249e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',1,3.11554119150475505861e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',2,3.21469311383348221866e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',3,3.31319507856377049037e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',4,3.46963590608335037401e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',5,3.57194646583615815771e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',6,3.67758202825114421941e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(2,'proxy',7,3.75888098030069084387e+00,7.07529255791921468654e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',0,3.00484442909665,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',1,3.10155157960076044432e+00,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',2,3.20305326928863687285e+00,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',3,3.30251558572966619209e+00,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',4,3.42141467770542062609e+00,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',5,3.50866038638059851706e+00,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',6,3.61389665289159411898e+00,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(3,'proxy',7,3.73210549547619185872e+00,2.06532754016505552818e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(4,'proxy',0,3.01013002334802504122e+00,5.68548657383251485053e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(4,'proxy',1,3.11045574162558446928e+00,5.68548657383251485053e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(4,'proxy',2,3.21099711125840547865e+00,5.68548657383251485053e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(4,'proxy',3,3.30975329866881384788e+00,5.68548657383251485053e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',0,2.99833413644355850635e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',1,3.09972489027082565016e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',2,3.20042169050498159776e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',3,3.30196385226774102861e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',4,3.38550391588359023131e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',5,3.50674225850157705863e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',6,3.59634228689949120294e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'proxy',7,3.69302893900500484036e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(6,'proxy',0,3.01951965392879539962e+00,1.02520334829490508687e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(6,'proxy',1,3.11781563787132798282e+00,1.02520334829490508687e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(6,'proxy',2,3.220817569139146741e+00,1.02520334829490508687e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(6,'proxy',3,3.31854702880978447154e+00,1.02520334829490508687e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(7,'proxy',0,NULL,NULL,63);
INSERT INTO "lpsearch_evaluations" VALUES(7,'proxy',1,NULL,NULL,63);
INSERT INTO "lpsearch_evaluations" VALUES(7,'proxy',2,NULL,NULL,63);
INSERT INTO "lpsearch_evaluations" VALUES(7,'proxy',3,NULL,NULL,63);
INSERT INTO "lpsearch_evaluations" VALUES(8,'proxy',0,3.06788357552672108496e+00,3.38363735143625388168e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(8,'proxy',1,3.16398927695314169383e+00,3.38363735143625388168e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(8,'proxy',2,3.26757574513792325987e+00,3.38363735143625388168e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(8,'proxy',3,3.3676077036188338809e+00,3.38363735143625388168e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',0,3.00846415979158354758e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',1,3.11018063189641047472e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',2,3.21141880176338689878e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',3,3.31171715093655505413e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',4,3.44299659936446600383e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',5,3.58360128970332647568e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',6,3.65986962824615957856e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(9,'proxy',7,3.74792184501528513607e+00,5.78302284032002206215e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',0,3.04813960449518139839e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',1,3.14527340300192559396e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',2,3.24716518488550542897e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',3,3.34542781522999188581e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',4,3.62404718315323703947e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',5,3.75420814192008256426e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',6,3.84134830938889759721e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'proxy',7,3.92890832079216734129e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',0,3.009178565540208794e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',1,3.10727646987158578895e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',2,3.20947495979361852036e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',3,3.31047943799740762571e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',4,3.43691859358901075083e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',5,3.5454026448821753803e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',6,3.64023893979108503771e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'proxy',7,3.75513443448119677015e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',0,3.0253085888882340626e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',1,3.12373221149717039679e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',2,3.22647207105202360466e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',3,3.32623273666622143451e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',4,3.52441127706988677203e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',5,3.65226167608392460195e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',6,3.73376628113775366202e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'proxy',7,3.84002734049147687045e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'heldout',0,3.0,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'heldout',1,3.1,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'heldout',2,3.2,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'heldout',3,3.3,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(1,'heldout',4,3.4,0.0,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'heldout',0,2.99167068221779297587e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'heldout',1,3.09862445135412833963e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'heldout',2,3.20210845252490816648e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'heldout',3,3.30981926133870674178e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(5,'heldout',4,3.38550391588359023131e+00,9.75362664875074935125e-04,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'heldout',0,3.04589282770104397002e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'heldout',1,3.13638234935792903357e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'heldout',2,3.24737479896809233537e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'heldout',3,3.35239718998703839503e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(11,'heldout',4,3.43691859358901075083e+00,5.16286380665256297572e-02,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'heldout',0,3.12654294444117,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'heldout',1,3.2186610574858520728e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'heldout',2,3.33236035526011820095e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'heldout',3,3.43116368333110743904e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(12,'heldout',4,3.52441127706988677203e+00,1.38483503804850777152e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'heldout',0,3.24069802247590743604e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'heldout',1,3.32636701500962717048e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'heldout',2,3.43582592442752732253e+00,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'heldout',3,3.52713907614996,2.39236429384042909029e-01,63);
INSERT INTO "lpsearch_evaluations" VALUES(10,'heldout',4,3.62404718315323703947e+00,2.39236429384042909029e-01,63);
CREATE TABLE lpsearch_fronts (
	study_id INTEGER NOT NULL, 
	front TEXT NOT NULL, 
	updated_at DOUBLE NOT NULL, 
	PRIMARY KEY (study_id), 
	FOREIGN KEY(study_id) REFERENCES lpsearch_studies (id)
);
INSERT INTO "lpsearch_fronts" VALUES(1,'{"front": [{"plan": "plans/joins-00.json", "groups": [[0], [1], [2], [3], [4], [5], [6], [7]]}, {"plan": "plans/joins-01.json", "groups": [[0], [1], [2], [3], [4], [5], [6, 7]]}, {"plan": "plans/joins-02.json", "groups": [[0], [1], [2], [3], [4, 5], [6, 7]]}, {"plan": "plans/joins-03.json", "groups": [[0], [1], [2, 3], [4, 5], [6, 7]]}, {"plan": "plans/joins-04.json", "groups": [[0, 1], [2, 3], [4, 5], [6, 7]]}]}',1.79581426759479880327e+09);
CREATE TABLE lpsearch_latency_profiles (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	profile TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(study_id) REFERENCES lpsearch_studies (id)
);
CREATE TABLE lpsearch_plans (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	plan_hash VARCHAR(64) NOT NULL, 
	groups TEXT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (study_id, plan_hash), 
	FOREIGN KEY(study_id) REFERENCES lpsearch_studies (id)
);
INSERT INTO "lpsearch_plans" VALUES(1,1,'34508b2ee36090eec976986f3c68506a055bbd6fb27d32c05f6aa7a34ba3af01','[[0],[1],[2],[3],[4],[5],[6],[7]]');
INSERT INTO "lpsearch_plans" VALUES(2,1,'d40fe0c36547d783c0f7e106007b7f1d4475b0057b7910a9d541514e3d2005c4','[[0,1],[2],[3],[4],[5],[6],[7]]');
INSERT INTO "lpsearch_plans" VALUES(3,1,'7e48586f62dfa5bc00ffd85ba0222320b293adf4c5c6beb3f87fedba127fc8c1','[[0],[1],[2],[3],[4,5],[6],[7]]');
INSERT INTO "lpsearch_plans" VALUES(4,1,'2252dc5c08e5afa8d3e5cab54e4de3a616af39594bb57d6c31d18e5ff076fc43','[[0],[1],[2,3],[4],[5],[6],[7]]');
INSERT INTO "lpsearch_plans" VALUES(5,1,'437b61a529d08551fe003d9b9f3254a6662c504707fcc29dc318301ca2bc35f4','[[0],[1],[2],[3],[4],[5],[6,7]]');
INSERT INTO "lpsearch_plans" VALUES(6,1,'8c361263cd41f1bcacbc5524300f6c9fcf75bf762d829267ab8899c006f31746','[[0],[1,2],[3],[4],[5],[6],[7]]');
INSERT INTO "lpsearch_plans" VALUES(7,1,'6e7207e34ad1fb369ac39592d2026499b2e6f2e0687dc081e4b88be1434d618c','[[0],[1],[2],[3,4],[5],[6],[7]]');
INSERT INTO "lpsearch_plans" VALUES(8,1,'43ac4f10816c5e648780217e844eacee0a98b0ae2fffb84323efe9f0256f4252','[[0],[1],[2],[3],[4],[5,6],[7]]');
INSERT INTO "lpsearch_plans" VALUES(9,1,'ea0da15df44186cbec30940499a0bd8c75f5a188af110a99ec9781146e0c8241','[[0],[1],[2,3],[4],[5],[6,7]]');
INSERT INTO "lpsearch_plans" VALUES(10,1,'e93a3dc7671470ce808a44406c6e28dcce57df99df1952e13921f4b9663036c7','[[0,1],[2,3],[4,5],[6,7]]');
INSERT INTO "lpsearch_plans" VALUES(11,1,'0361b77d8f16be36541c5f7efe503e895ef1801319f30471985a8cf91ebfcdef','[[0],[1],[2],[3],[4,5],[6,7]]');
INSERT INTO "lpsearch_plans" VALUES(12,1,'75af87ded04cb5e0104dfb34b357091e32dd5dbd410c03e6b36eab0d025b327c','[[0],[1],[2,3],[4,5],[6,7]]');
CREATE TABLE lpsearch_studies (
	id INTEGER NOT NULL, 
	name VARCHAR(512) NOT NULL, 
	settings TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "lpsearch_studies" VALUES(1,'demo','{"max_group": 2, "metric": "nll", "num_layers": 8, "objective": "depth", "sampler": "pairset", "seed": 1}',1.79581426683303189278e+09);
CREATE TABLE lpsearch_windows (
	study_id INTEGER NOT NULL, 
	split VARCHAR(16) NOT NULL, 
	spec TEXT NOT NULL, 
	num_windows INTEGER NOT NULL, 
	seq_len INTEGER NOT NULL, 
	content_hash VARCHAR(64) NOT NULL, 
	input_ids BLOB NOT NULL, 
	PRIMARY KEY (study_id, split), 
	FOREIGN KEY(study_id) REFERENCES lpsearch_studies (id)
);
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'demo');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
INSERT INTO "study_directions" VALUES(2,'MINIMIZE',1,1);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_system_attributes" VALUES(1,1,'study:metric_names','["depth_reduction", "perplexity"]');
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(2,1,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(3,1,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(4,1,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(5,1,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(6,1,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(7,1,'join_006',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(8,2,'join_000',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(9,2,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(10,2,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(11,2,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(12,2,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(13,2,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(14,2,'join_006',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(15,3,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(16,3,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(17,3,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(18,3,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(19,3,'join_004',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(20,3,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(21,3,'join_006',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(22,4,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(23,4,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(24,4,'join_002',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(25,4,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(26,4,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(27,4,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(28,4,'join_006',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(29,5,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(30,5,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(31,5,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(32,5,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(33,5,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(34,5,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(35,5,'join_006',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(36,6,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(37,6,'join_001',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(38,6,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(39,6,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(40,6,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(41,6,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(42,6,'join_006',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(43,7,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(44,7,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(45,7,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(46,7,'join_003',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(47,7,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(48,7,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(49,7,'join_006',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(50,8,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(51,8,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(52,8,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(53,8,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(54,8,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(55,8,'join_005',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(56,8,'join_006',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(57,9,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(58,9,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(59,9,'join_002',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(60,9,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(61,9,'join_004',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(62,9,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(63,9,'join_006',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(64,10,'join_000',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(65,10,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(66,10,'join_002',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(67,10,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(68,10,'join_004',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(69,10,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(70,10,'join_006',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(71,11,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(72,11,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(73,11,'join_002',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(74,11,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(75,11,'join_004',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(76,11,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(77,11,'join_006',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(78,12,'join_000',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(79,12,'join_001',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(80,12,'join_002',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(81,12,'join_003',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(82,12,'join_004',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(83,12,'join_005',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
INSERT INTO "trial_params" VALUES(84,12,'join_006',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [false, true]}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_system_attributes" VALUES(1,1,'fixed_params','{"join_000": false, "join_001": false, "join_002": false, "join_003": false, "join_004": false, "join_005": false, "join_006": false}');
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'origin','"baseline"');
INSERT INTO "trial_user_attributes" VALUES(2,1,'groups','"[[0],[1],[2],[3],[4],[5],[6],[7]]"');
INSERT INTO "trial_user_attributes" VALUES(3,2,'origin','"scan"');
INSERT INTO "trial_user_attributes" VALUES(4,2,'groups','"[[0,1],[2],[3],[4],[5],[6],[7]]"');
INSERT INTO "trial_user_attributes" VALUES(5,1,'num_joins','0');
INSERT INTO "trial_user_attributes" VALUES(6,1,'nll','3.35');
INSERT INTO "trial_user_attributes" VALUES(7,1,'delta_nll','0.0');
INSERT INTO "trial_user_attributes" VALUES(8,1,'delta_nll_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(9,1,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(10,1,'kl_nats_per_token','0.0');
INSERT INTO "trial_user_attributes" VALUES(11,1,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(12,3,'origin','"scan"');
INSERT INTO "trial_user_attributes" VALUES(13,3,'groups','"[[0],[1],[2],[3],[4,5],[6],[7]]"');
INSERT INTO "trial_user_attributes" VALUES(14,2,'num_joins','1');
INSERT INTO "trial_user_attributes" VALUES(15,2,'nll','3.3922882224975375');
INSERT INTO "trial_user_attributes" VALUES(16,2,'delta_nll','0.04228822249753733');
INSERT INTO "trial_user_attributes" VALUES(17,2,'delta_nll_se','0.010453855771283856');
INSERT INTO "trial_user_attributes" VALUES(18,2,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(19,2,'kl_nats_per_token','0.07075292557919215');
INSERT INTO "trial_user_attributes" VALUES(20,2,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(21,4,'origin','"scan"');
INSERT INTO "trial_user_attributes" VALUES(22,4,'groups','"[[0],[1],[2,3],[4],[5],[6],[7]]"');
INSERT INTO "trial_user_attributes" VALUES(23,3,'num_joins','1');
INSERT INTO "trial_user_attributes" VALUES(24,3,'nll','3.36100525952119');
INSERT INTO "trial_user_attributes" VALUES(25,3,'delta_nll','0.011005259521189803');
INSERT INTO "trial_user_attributes" VALUES(26,3,'delta_nll_se','0.0038500258238043958');
INSERT INTO "trial_user_attributes" VALUES(27,3,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(28,3,'kl_nats_per_token','0.020653275401650555');
INSERT INTO "trial_user_attributes" VALUES(29,3,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(30,5,'origin','"scan"');
INSERT INTO "trial_user_attributes" VALUES(31,5,'groups','"[[0],[1],[2],[3],[4],[5],[6,7]]"');
INSERT INTO "trial_user_attributes" VALUES(32,4,'num_joins','1');
INSERT INTO "trial_user_attributes" VALUES(33,4,'nll','3.3603340437252074');
INSERT INTO "trial_user_attributes" VALUES(34,4,'delta_nll','0.010334043725207187');
INSERT INTO "trial_user_attributes" VALUES(35,4,'delta_nll_se','0.000263527049112656');
INSERT INTO "trial_user_attributes" VALUES(36,4,'proxy_tokens','252');
INSERT INTO "trial_user_attributes" VALUES(37,4,'kl_nats_per_token','0.05685486573832515');
INSERT INTO "trial_user_attributes" VALUES(38,4,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(39,6,'origin','"scan"');
INSERT INTO "trial_user_attributes" VALUES(40,6,'groups','"[[0],[1,2],[3],[4],[5],[6],[7]]"');
INSERT INTO "trial_user_attributes" VALUES(41,5,'num_joins','1');
INSERT INTO "trial_user_attributes" VALUES(42,5,'nll','3.347757746222096');
INSERT INTO "trial_user_attributes" VALUES(43,5,'delta_nll','-0.002242253777903769');
INSERT INTO "trial_user_attributes" VALUES(44,5,'delta_nll_se','0.0022529059419398962');
INSERT INTO "trial_user_attributes" VALUES(45,5,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(46,5,'kl_nats_per_token','0.0009753626648750749');
INSERT INTO "trial_user_attributes" VALUES(47,5,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(48,7,'origin','"scan"');
INSERT INTO "trial_user_attributes" VALUES(49,7,'groups','"[[0],[1],[2],[3,4],[5],[6],[7]]"');
INSERT INTO "trial_user_attributes" VALUES(50,6,'num_joins','1');
INSERT INTO "trial_user_attributes" VALUES(51,6,'nll','3.3691749724372637');
INSERT INTO "trial_user_attributes" VALUES(52,6,'delta_nll','0.019174972437263627');
INSERT INTO "trial_user_attributes" VALUES(53,6,'delta_nll_se','0.0006492966012719977');
INSERT INTO "trial_user_attributes" VALUES(54,6,'proxy_tokens','252');
INSERT INTO "trial_user_attributes" VALUES(55,6,'kl_nats_per_token','0.10252033482949051');
INSERT INTO "trial_user_attributes" VALUES(56,6,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(57,8,'origin','"scan"');
INSERT INTO "trial_user_attributes" VALUES(58,8,'groups','"[[0],[1],[2],[3],[4],[5,6],[7]]"');
INSERT INTO "trial_user_attributes" VALUES(59,7,'num_joins','1');
INSERT INTO "trial_user_attributes" VALUES(60,7,'nll','null');
INSERT INTO "trial_user_attributes" VALUES(61,7,'delta_nll','null');
INSERT INTO "trial_user_attributes" VALUES(62,7,'delta_nll_se','null');
INSERT INTO "trial_user_attributes" VALUES(63,7,'proxy_tokens','252');
INSERT INTO "trial_user_attributes" VALUES(64,7,'kl_nats_per_token','null');
INSERT INTO "trial_user_attributes" VALUES(65,7,'kl_se','null');
INSERT INTO "trial_user_attributes" VALUES(66,9,'origin','"programme"');
INSERT INTO "trial_user_attributes" VALUES(67,9,'groups','"[[0],[1],[2,3],[4],[5],[6,7]]"');
INSERT INTO "trial_user_attributes" VALUES(68,8,'num_joins','1');
INSERT INTO "trial_user_attributes" VALUES(69,8,'nll','3.416764075309155');
INSERT INTO "trial_user_attributes" VALUES(70,8,'delta_nll','0.06676407530915496');
INSERT INTO "trial_user_attributes" VALUES(71,8,'delta_nll_se','0.0009275102555358218');
INSERT INTO "trial_user_attributes" VALUES(72,8,'proxy_tokens','252');
INSERT INTO "trial_user_attributes" VALUES(73,8,'kl_nats_per_token','0.3383637351436254');
INSERT INTO "trial_user_attributes" VALUES(74,8,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(75,10,'origin','"surrogate"');
INSERT INTO "trial_user_attributes" VALUES(76,10,'groups','"[[0,1],[2,3],[4,5],[6,7]]"');
INSERT INTO "trial_user_attributes" VALUES(77,9,'num_joins','2');
INSERT INTO "trial_user_attributes" VALUES(78,9,'nll','3.3845212633396464');
INSERT INTO "trial_user_attributes" VALUES(79,9,'delta_nll','0.03452126333964661');
INSERT INTO "trial_user_attributes" VALUES(80,9,'delta_nll_se','0.010024956144380055');
INSERT INTO "trial_user_attributes" VALUES(81,9,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(82,9,'kl_nats_per_token','0.05783022840320022');
INSERT INTO "trial_user_attributes" VALUES(83,9,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(84,11,'origin','"surrogate"');
INSERT INTO "trial_user_attributes" VALUES(85,11,'groups','"[[0],[1],[2],[3],[4,5],[6,7]]"');
INSERT INTO "trial_user_attributes" VALUES(86,10,'num_joins','4');
INSERT INTO "trial_user_attributes" VALUES(87,10,'nll','3.4918147453583734');
INSERT INTO "trial_user_attributes" VALUES(88,10,'delta_nll','0.14181474535837357');
INSERT INTO "trial_user_attributes" VALUES(89,10,'delta_nll_se','0.03616206404700641');
INSERT INTO "trial_user_attributes" VALUES(90,10,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(91,10,'kl_nats_per_token','0.2392364293840429');
INSERT INTO "trial_user_attributes" VALUES(92,10,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(93,12,'origin','"surrogate"');
INSERT INTO "trial_user_attributes" VALUES(94,12,'groups','"[[0],[1],[2,3],[4,5],[6,7]]"');
INSERT INTO "trial_user_attributes" VALUES(95,11,'num_joins','2');
INSERT INTO "trial_user_attributes" VALUES(96,11,'nll','3.3767630057432863');
INSERT INTO "trial_user_attributes" VALUES(97,11,'delta_nll','0.02676300574328605');
INSERT INTO "trial_user_attributes" VALUES(98,11,'delta_nll_se','0.006930882761285459');
INSERT INTO "trial_user_attributes" VALUES(99,11,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(100,11,'kl_nats_per_token','0.05162863806652563');
INSERT INTO "trial_user_attributes" VALUES(101,11,'kl_se','0.0');
INSERT INTO "trial_user_attributes" VALUES(102,12,'num_joins','3');
INSERT INTO "trial_user_attributes" VALUES(103,12,'nll','3.4315265228608363');
INSERT INTO "trial_user_attributes" VALUES(104,12,'delta_nll','0.08152652286083639');
INSERT INTO "trial_user_attributes" VALUES(105,12,'delta_nll_se','0.02137377232698388');
INSERT INTO "trial_user_attributes" VALUES(106,12,'proxy_tokens','504');
INSERT INTO "trial_user_attributes" VALUES(107,12,'kl_nats_per_token','0.13848350380485078');
INSERT INTO "trial_user_attributes" VALUES(108,12,'kl_se','0.0');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,0.0,'FINITE');
INSERT INTO "trial_values" VALUES(2,1,1,2.85027336437672822455e+01,'FINITE');
INSERT INTO "trial_values" VALUES(3,2,0,0.125,'FINITE');
INSERT INTO "trial_values" VALUES(4,2,1,2.97339122939392090927e+01,'FINITE');
INSERT INTO "trial_values" VALUES(5,3,0,0.125,'FINITE');
INSERT INTO "trial_values" VALUES(6,3,1,2.88181460387679102544e+01,'FINITE');
INSERT INTO "trial_values" VALUES(7,4,0,0.125,'FINITE');
INSERT INTO "trial_values" VALUES(8,4,1,2.87988093342125104365e+01,'FINITE');
INSERT INTO "trial_values" VALUES(9,5,0,0.125,'FINITE');
INSERT INTO "trial_values" VALUES(10,5,1,2.84388948796757894399e+01,'FINITE');
INSERT INTO "trial_values" VALUES(11,6,0,0.125,'FINITE');
INSERT INTO "trial_values" VALUES(12,6,1,2.9054546365217039038e+01,'FINITE');
INSERT INTO "trial_values" VALUES(13,7,0,0.125,'FINITE');
INSERT INTO "trial_values" VALUES(14,7,1,NULL,'INF_POS');
INSERT INTO "trial_values" VALUES(15,8,0,0.125,'FINITE');
INSERT INTO "trial_values" VALUES(16,8,1,3.04706545730633884252e+01,'FINITE');
INSERT INTO "trial_values" VALUES(17,9,0,0.25,'FINITE');
INSERT INTO "trial_values" VALUES(18,9,1,2.950386475295501043e+01,'FINITE');
INSERT INTO "trial_values" VALUES(19,10,0,0.5,'FINITE');
INSERT INTO "trial_values" VALUES(20,10,1,3.2845499872316537449e+01,'FINITE');
INSERT INTO "trial_values" VALUES(21,11,0,0.25,'FINITE');
INSERT INTO "trial_values" VALUES(22,11,1,2.92758518053891307886e+01,'FINITE');
INSERT INTO "trial_values" VALUES(23,12,0,0.375,'FINITE');
INSERT INTO "trial_values" VALUES(24,12,1,3.09238126445018046695e+01,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-27 21:17:46.869713','2026-11-27 21:17:46.905684');
INSERT INTO "trials" VALUES(2,1,1,'COMPLETE','2026-11-27 21:17:46.886425','2026-11-27 21:17:46.930786');
INSERT INTO "trials" VALUES(3,2,1,'COMPLETE','2026-11-27 21:17:46.911271','2026-11-27 21:17:46.955124');
INSERT INTO "trials" VALUES(4,3,1,'COMPLETE','2026-11-27 21:17:46.935575','2026-11-27 21:17:46.982838');
INSERT INTO "trials" VALUES(5,4,1,'COMPLETE','2026-11-27 21:17:46.960294','2026-11-27 21:17:47.018315');
INSERT INTO "trials" VALUES(6,5,1,'COMPLETE','2026-11-27 21:17:46.987639','2026-11-27 21:17:47.050003');
INSERT INTO "trials" VALUES(7,6,1,'COMPLETE','2026-11-27 21:17:47.023462','2026-11-27 21:17:47.084897');
INSERT INTO "trials" VALUES(8,7,1,'COMPLETE','2026-11-27 21:17:47.059015','2026-11-27 21:17:47.122861');
INSERT INTO "trials" VALUES(9,8,1,'COMPLETE','2026-11-27 21:17:47.093904','2026-11-27 21:17:47.172262');
INSERT INTO "trials" VALUES(10,9,1,'COMPLETE','2026-11-27 21:17:47.127846','2026-11-27 21:17:47.401107');
INSERT INTO "trials" VALUES(11,10,1,'COMPLETE','2026-11-27 21:17:47.192021','2026-11-27 21:17:47.516363');
INSERT INTO "trials" VALUES(12,11,1,'COMPLETE','2026-11-27 21:17:47.418978','2026-11-27 21:17:47.564124');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;