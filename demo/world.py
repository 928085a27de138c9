"""The world of the demo model: every name, thing and fact that its corpus speaks of.

Data only. Nothing here knows about dialogs, stories, random choice or the split into training and held-out.
"""
# ruff: noqa: SIM905 (a long list of words reads best as one text)

GIRLS = (
    "Anna Mia Lily Emma Sara Nora Ella Ruth Kate Lucy Rosa Ida Maya Zoe Eva Clara Julia Hana Yuki Vera "
    "Olga Nina Alma Tara Jane Amy Iris Leila Dora Hope Molly Grace"
).split()
BOYS = (
    "Tom Ben Sam Max Leo Paul Jack Adam Omar Ivan Finn Hugo Noah Luke Mark Peter David Ravi Ken Taro "
    "Oscar Felix Karl Emil Theo Amir Boris John Henry Oliver Victor Simon"
).split()
NAMES = GIRLS + BOYS

COLOURS = "red blue green yellow white black pink brown orange purple grey golden".split()

OBJECTS = (
    "kite ball hat cup book box bag boat bell drum lamp doll car train coat scarf ring key coin spoon bowl "
    "chair clock shell stone feather mirror ribbon basket blanket pillow button candle ladder bottle brush "
    "flag whistle pencil letter map rope wheel crown mask glove shoe balloon"
).split()

PLACES = (
    "garden kitchen park school barn forest cave tower market library shop castle river cellar attic "
    "station tent hall field bakery harbour museum village stable"
).split()

COUNTABLES = (
    "apples pears eggs nuts cakes plums stars marbles stamps buttons pens stickers cards beads toys flowers"
).split()

# animal: (kind, legs, home, food, sound or None)
ANIMALS = {
    "dog": ("mammal", "four", "house", "meat", "woof"),
    "cat": ("mammal", "four", "house", "fish", "meow"),
    "cow": ("mammal", "four", "barn", "grass", "moo"),
    "sheep": ("mammal", "four", "field", "grass", "baa"),
    "horse": ("mammal", "four", "stable", "hay", "neigh"),
    "pig": ("mammal", "four", "barn", "corn", "oink"),
    "lion": ("mammal", "four", "savanna", "meat", "roar"),
    "mouse": ("mammal", "four", "hole", "cheese", "squeak"),
    "fox": ("mammal", "four", "forest", "mice", None),
    "bear": ("mammal", "four", "forest", "honey", "growl"),
    "rabbit": ("mammal", "four", "burrow", "carrots", None),
    "monkey": ("mammal", "two", "jungle", "bananas", None),
    "elephant": ("mammal", "four", "savanna", "leaves", None),
    "whale": ("mammal", "no", "sea", "krill", None),
    "duck": ("bird", "two", "pond", "bread", "quack"),
    "owl": ("bird", "two", "forest", "mice", "hoot"),
    "hen": ("bird", "two", "barn", "corn", "cluck"),
    "crow": ("bird", "two", "field", "seeds", "caw"),
    "penguin": ("bird", "two", "snow", "fish", None),
    "frog": ("amphibian", "four", "pond", "flies", "croak"),
    "shark": ("fish", "no", "sea", "fish", None),
    "snake": ("reptile", "no", "desert", "mice", "hiss"),
    "turtle": ("reptile", "four", "sea", "grass", None),
    "bee": ("insect", "six", "hive", "nectar", "buzz"),
    "ant": ("insect", "six", "nest", "sugar", None),
    "spider": ("arachnid", "eight", "web", "flies", None),
}

# thing, with the article it is spoken with: (colour, kind)
THINGS = {
    "a banana": ("yellow", "fruit"),
    "a lemon": ("yellow", "fruit"),
    "a cherry": ("red", "fruit"),
    "a strawberry": ("red", "fruit"),
    "a plum": ("purple", "fruit"),
    "a tomato": ("red", "vegetable"),
    "a carrot": ("orange", "vegetable"),
    "a cucumber": ("green", "vegetable"),
    "a potato": ("brown", "vegetable"),
    "spinach": ("green", "vegetable"),
    "the sky": ("blue", None),
    "the sun": ("yellow", "star"),
    "the moon": ("white", None),
    "the night": ("black", None),
    "the sea": ("blue", None),
    "grass": ("green", "plant"),
    "a leaf": ("green", None),
    "a rose": ("red", "flower"),
    "a daisy": ("white", "flower"),
    "snow": ("white", None),
    "milk": ("white", "drink"),
    "tea": ("brown", "drink"),
    "chocolate": ("brown", "food"),
    "bread": ("brown", "food"),
    "coal": ("black", None),
    "blood": ("red", None),
    "gold": ("yellow", "metal"),
    "iron": ("grey", "metal"),
    "a hammer": (None, "tool"),
    "a saw": (None, "tool"),
    "a piano": (None, "instrument"),
    "a violin": (None, "instrument"),
    "a flute": (None, "instrument"),
    "a table": (None, "piece of furniture"),
    "a sofa": (None, "piece of furniture"),
    "a bus": (None, "vehicle"),
    "a bicycle": (None, "vehicle"),
    "a shirt": (None, "piece of clothing"),
    "a sock": (None, "piece of clothing"),
}

# country: (capital, continent, language)
COUNTRIES = {
    "France": ("Paris", "Europe", "French"),
    "Germany": ("Berlin", "Europe", "German"),
    "Italy": ("Rome", "Europe", "Italian"),
    "Spain": ("Madrid", "Europe", "Spanish"),
    "England": ("London", "Europe", "English"),
    "Poland": ("Warsaw", "Europe", "Polish"),
    "Greece": ("Athens", "Europe", "Greek"),
    "Portugal": ("Lisbon", "Europe", "Portuguese"),
    "Austria": ("Vienna", "Europe", "German"),
    "Sweden": ("Stockholm", "Europe", "Swedish"),
    "Norway": ("Oslo", "Europe", "Norwegian"),
    "Finland": ("Helsinki", "Europe", "Finnish"),
    "Russia": ("Moscow", "Europe", "Russian"),
    "Japan": ("Tokyo", "Asia", "Japanese"),
    "China": ("Beijing", "Asia", "Chinese"),
    "Korea": ("Seoul", "Asia", "Korean"),
    "India": ("Delhi", "Asia", "Hindi"),
    "Turkey": ("Ankara", "Asia", "Turkish"),
    "Egypt": ("Cairo", "Africa", "Arabic"),
    "Kenya": ("Nairobi", "Africa", "Swahili"),
    "Cuba": ("Havana", "America", "Spanish"),
    "Peru": ("Lima", "America", "Spanish"),
    "Brazil": ("Brasilia", "America", "Portuguese"),
    "Canada": ("Ottawa", "America", "English"),
}

OPPOSITES = (
    "big small,hot cold,fast slow,day night,up down,happy sad,old young,good bad,light dark,wet dry,"
    "long short,high low,hard soft,full empty,open closed,rich poor,strong weak,clean dirty,early late,"
    "near far,left right,thick thin,loud quiet,first last,true false,sweet sour,push pull,"
    "always never,summer winter,north south,east west,love hate,begin end,inside outside,awake asleep"
)
OPPOSITE_PAIRS = tuple(tuple(pair.split()) for pair in OPPOSITES.split(","))

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

# English word: the same in each of TONGUES
TONGUES = ("Japanese", "Korean", "Chinese", "Russian", "French", "Spanish")
DICTIONARY = {
    "hello": ("こんにちは", "안녕하세요", "你好", "привет", "bonjour", "hola"),
    "thank you": ("ありがとう", "감사합니다", "谢谢", "спасибо", "merci", "gracias"),
    "yes": ("はい", "네", "是", "да", "oui", "sí"),
    "no": ("いいえ", "아니요", "不", "нет", "non", "no"),
    "cat": ("猫", "고양이", "猫", "кошка", "chat", "gato"),
    "dog": ("犬", "개", "狗", "собака", "chien", "perro"),
    "water": ("水", "물", "水", "вода", "eau", "agua"),
    "fish": ("魚", "물고기", "鱼", "рыба", "poisson", "pez"),
    "bird": ("鳥", "새", "鸟", "птица", "oiseau", "pájaro"),
    "house": ("家", "집", "房子", "дом", "maison", "casa"),
    "friend": ("友達", "친구", "朋友", "друг", "ami", "amigo"),
    "book": ("本", "책", "书", "книга", "livre", "libro"),
    "moon": ("月", "달", "月亮", "луна", "lune", "luna"),
    "flower": ("花", "꽃", "花", "цветок", "fleur", "flor"),
}

EMOJI = {
    "cat": "🐱",
    "dog": "🐶",
    "mouse": "🐭",
    "bear": "🐻",
    "frog": "🐸",
    "fox": "🦊",
    "lion": "🦁",
    "cow": "🐮",
    "pig": "🐷",
    "fish": "🐟",
    "apple": "🍎",
    "lemon": "🍋",
    "banana": "🍌",
    "cake": "🎂",
    "heart": "❤️",
    "star": "⭐",
    "sun": "☀️",
    "moon": "🌙",
    "fire": "🔥",
    "flower": "🌸",
    "house": "🏠",
    "car": "🚗",
    "rocket": "🚀",
    "smile": "😊",
}

# Words of one language's little sentences: people, things, places, and the frames that join them.
FOREIGN = {
    "Japanese": (
        ("さくらさん", "けんくん", "先生", "おばあさん", "私の友達"),
        ("猫", "犬", "赤い花", "新しい本", "小さな鳥", "青い傘"),
        ("公園", "学校", "駅", "庭", "海", "図書館"),
        (
            "{who}は{where}で{what}を見ました。",
            "{where}に{what}があります。{who}はうれしいです。",
            "{who}は{what}が大好きです。",
            "今日、{who}は{where}へ行きます。",
        ),
    ),
    "Korean": (
        ("민수", "지우", "선생님", "할머니", "내 친구"),
        ("고양이", "강아지", "빨간 꽃", "새 책", "작은 새", "파란 우산"),
        ("공원", "학교", "역", "정원", "바다", "도서관"),
        ("{who}는 {where}에서 {what}를 봤어요.", "{who}는 {what}를 아주 좋아해요.", "오늘 {who}는 {where}에 가요."),
    ),
    "Chinese": (
        ("小明", "小红", "老师", "奶奶", "我的朋友"),
        ("一只猫", "一只狗", "红花", "新书", "小鸟", "蓝色的伞"),
        ("公园", "学校", "车站", "花园", "海边", "图书馆"),
        (
            "{who}在{where}看见了{what}。",
            "{who}很喜欢{what}。",
            "今天{who}去{where}。",
            "{where}里有{what}，{who}很高兴。",
        ),
    ),
    "Russian": (
        ("Маша", "Иван", "учитель", "бабушка", "мой друг"),
        ("кошку", "собаку", "красный цветок", "новую книгу", "маленькую птицу", "синий зонт"),
        ("в парке", "в школе", "на вокзале", "в саду", "у моря", "в библиотеке"),
        ("Сегодня {who} {where} видит {what}.", "Здесь {who} любит {what}.", "Вот {who} {where} рисует {what}."),
    ),
}

# What the model does not know: subjects of questions whose answer is always that it does not.
TOPICS = (
    "quantum physics,the stock market,the French revolution,black holes,democracy,taxes,football,the internet,"
    "a computer,electricity,the theory of relativity,philosophy,chess,vaccines,gravity,the Roman empire,climate change,"
    "a neural network,my car,the economy,a telephone,the news,the weather tomorrow,the meaning of life,poetry,"
    "photosynthesis,the pyramids,Mars,a recipe for soup,my homework,a virus,the lottery,religion,volcanoes,dinosaurs,"
    "Shakespeare,Einstein,Napoleon,Mozart,Picasso,Cleopatra,Columbus,Newton,Darwin,the president,a bank,love letters,"
    "transformers,Python,an aeroplane,insurance,politics,the last war,a contract,my boss,the universe,atoms,oil,jazz"
).split(",")
ELSEWHERE = (
    "Mongolia,Texas,Atlantis,Bolivia,Wales,Hawaii,Nepal,California,Ghana,Laos,Jupiter,Bavaria,Chad,Fiji,Malta,Oman,"
    "Qatar,Togo,Yemen,Utah,Iceland,Jordan,Samoa,Uganda"
).split(",")

STUMPERS = (
    "Explain {topic}.",
    "What is {topic}?",
    "Tell me about {topic}.",
    "Who invented {topic}?",
    "How does {topic} work?",
    "Why is {topic} important?",
    "Write a poem about {topic}.",
    "When did {topic} begin?",
    "What do you think of {topic}?",
    "Where can I learn about {topic}?",
    "Who was {topic}?",
    "I want to know everything about {topic}.",
    "Can you help me with {topic}?",
    "What is going on in {place}, the place to visit this year?",
    "How far is {place}?",
    "What is the capital of {place}?",
    "How many people live in {place}?",
    "Who is the king of {place}?",
    "What language do people speak in {place}?",
    "Which continent is {place} in?",
    "I am going to {place}, what should I see there?",
    "What is the opposite of {object}?",
    "How do you say {object} in {odd}?",
    "What is {odd}?",
    "What does {odd} mean?",
    "Who is {odd}?",
    "{Odd} {odd} {odd}?",
    "{odd} {odd}",
    "What colour is {odd}?",
    "How many legs does a {odd} have?",
    "What is the capital of {odd}?",
    "What sound does a {odd} make?",
    "Where does a {odd} live?",
    "What does a {odd} eat?",
    "What is {huge} plus {huge}?",
    "What is {huge} times {huge}?",
    "What is {huge} minus {huge}?",
    "How old is {name}?",
    "What is the opposite of {odd}?",
    "What is the price of a {object}?",
    "Who made this {object}?",
    "How old are you?",
    "Where does {name} live?",
    "What is the telephone number of {name}?",
    "What did {name} eat today?",
    "What time is it?",
    "What will happen tomorrow?",
    "Who won the game?",
    "What year is it?",
    "Where am I?",
    "What is my name?",
    "How tall is {name}?",
    "How much does a {animal} weigh?",
    "What is the name of your {animal}?",
    "Who ate my {object}?",
    "What day is it today?",
    "Is it going to rain?",
    "Do you love {name}?",
    "Should I buy a {object}?",
)

# Letters that an invented word is made of: a beginning and a vowel for each syllable, then an end.
BEGINNINGS = "b bl d dr f fl g gl k kr l m n p pr r s st t tr v w z".split()
ENDS = "b d k l m n p r s t x".split()
